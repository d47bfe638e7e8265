"""What the commands write over, what they refuse to, and what is said where memory runs out."""

# ruff: noqa: F401, F811  (world is a fixture)

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minibnf.evaluate import main as evaluate
from minibnf.files.disk import locked, read_json
from minibnf.files.safetensors import write_tensors
from minibnf.generate import main as generate
from minibnf.lab.smallworld import main as smallworld
from minibnf.machine import memory_advice
from minibnf.model import fresh
from minibnf.run import load_training, save_training
from minibnf.arguments import parse
from minibnf.train import learning_rate, main, optimizers
from tests.strategies import FEW
from tests.test_train import arguments, logged, rows, same, weights, world, write

CPU = ["--device", "cpu"]


def contents(folder):
    """{path: bytes} of every file below."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def place(folder, names):
    """Files of these names, each holding its own."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


OTHERS = ["notes.txt", "figures/mine.svg", "models/x", "reference.txt"]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The folder of a run of three steps, which held other files before."""
    out = tmp_path_factory.mktemp("finished") / "run"
    place(out, OTHERS)
    flags = ["--eval-data", world / "held-out.jsonl", "--loss", "kto", "--max-steps", 3, *CPU]
    assert main(arguments(world, out, "--lr", 1e-3, *flags)) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


# ---------------------------------------------------------------------------- --out of the trainer


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    "name",
    [
        "config.json", "model/model.safetensors", "metrics.jsonl", "checkpoints/step-0000001",
        "figures/training.png", "reference-train.safetensors",
    ],
)  # fmt: skip
def test_what_a_run_would_write_over_and_no_run_wrote_is_refused(
    world, tmp_path, capsys, name, flags
):
    out = tmp_path / "mine"
    place(out, [name, "notes.txt"])
    before = contents(out)
    assert main(arguments(world, out, "--max-steps", 1, *CPU, *flags)) == 1
    held = "model" if name.startswith("model") else name
    what = "and no config.json of a run of minibnf; name another folder"
    said = f"error: --out {out} holds {held}, {what}\n"
    assert capsys.readouterr().err == said
    assert contents(out) == before


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("flag", ["--data", "--eval-data", "--model"])
def test_an_input_within_out_is_refused(world, tmp_path, run, capsys, flag, linked):
    """Itself, or what a link elsewhere points to."""
    inner = run / "mine"
    if flag == "--model":
        shutil.copytree(world / "model", inner)
    else:
        shutil.copyfile(world / "pairs.jsonl", inner)
    given = inner
    if linked:
        given = tmp_path / "link"
        given.symlink_to(inner)
    before = contents(run)
    assert main([*arguments(world, run, *CPU, "--overwrite"), flag, str(given)]) == 1
    assert f"error: {flag} {given} lies in --out {run}" in capsys.readouterr().err
    assert contents(run) == before


def test_overwrite_deletes_what_the_run_wrote_and_nothing_else(world, run):
    kept = [*OTHERS, "checkpoints/notes.txt", "checkpoints/step-2-good/x"]
    place(run, [*kept[4:], ".model.tmp/x", "checkpoints/.step-0000009.tmp/x"])
    flags = ["--max-steps", 2, "--save-every", 1, "--overwrite", *CPU]
    assert main(arguments(world, run, *flags)) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["facts"]["steps"] == 2 and [row["step"] for row in logged(run)] == [1, 2]
    made = {"config.json", "metrics.jsonl", "reference-train.safetensors", "figures/training.png"}
    for step in ("checkpoints/step-0000001/", "checkpoints/step-0000002/"):
        made |= {f"{step}{name}.safetensors" for name in ("model", "optimizer-0", "state")}
    found = {name: x for name, x in contents(run).items() if not name.startswith("model/")}
    assert found.keys() == made | set(kept)
    assert all(found[name] == name.encode() for name in kept)
    assert main(["--resume", "--out", str(run)]) == 0


def test_overwrite_interrupted_anywhere_leaves_a_run_that_goes_on(
    world, tmp_path, finished, monkeypatch
):
    """At the n-th file that is renamed or deleted, for every n until the new run has begun.

    Then --resume ends as the old run did (or the new one); and --overwrite, of every third n, as
    the new one.
    """
    new = arguments(world, tmp_path / "new", "--lr", 1e-3, "--max-steps", 1, *CPU)
    assert main(new) == 0
    ends = [weights(finished), weights(tmp_path / "new")]
    done, left = False, 0
    while not done:
        out = shutil.copytree(finished, tmp_path / str(left))
        command = [*new, "--out", str(out), "--overwrite"]
        calls = []

        def counted(name, calls=calls, stop=left):
            real = getattr(os, name)

            def call(*args, **how):
                if len(calls) == stop:
                    raise KeyboardInterrupt
                calls.append(name)
                return real(*args, **how)

            return call

        def begun(*_):
            raise EOFError

        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir", "rename", "replace"):
                patch.setattr(os, name, counted(name))
            patch.setattr("minibnf.train.summary", begun)
            try:
                assert main(command) == 130
            except EOFError:
                done = True
        if left % 3 == 2:
            assert main(command) == 0
            assert same(weights(out), ends[1])
        else:
            assert main(["--resume", "--out", str(out), *CPU]) == 0
            assert any(same(weights(out), end) for end in ends)
        left += 1
    assert left > 10


# ---------------------------------------------------------------- --out of evaluate and of generate


@pytest.fixture
def answers(tmp_path):
    answer = {"prompt": "Who?", "completion": " Will."}
    return write(tmp_path / "answers.jsonl", [answer])


def evaluated(world, data, out, *flags):
    command = ["--model", world / "model", "--data", data, "--out", out, *CPU, *flags]
    return evaluate([str(word) for word in command])


def generated(world, data, out, *flags):
    short = ["--max-new-tokens", 2, *CPU]
    command = ["--model", world / "model", "--data", data, "--out", out, *short, *flags]
    return generate([str(word) for word in command])


COMMANDS = pytest.mark.parametrize("command", [evaluated, generated])


@COMMANDS
def test_a_file_that_exists_is_replaced_only_when_told(world, tmp_path, answers, capsys, command):
    out = tmp_path / "out.json"
    out.write_text("mine")
    assert command(world, answers, out) == 1 and out.read_text() == "mine"
    error = capsys.readouterr().err
    assert f"{out} exists already; " in error and "--overwrite" in error
    assert command(world, answers, out, "--overwrite") == 0
    replaced = out.read_text()
    assert command(world, answers, tmp_path / "other.json") == 0
    other = (tmp_path / "other.json").read_text()
    assert replaced == other.replace("other.json", "out.json")
    assert command(world, answers, tmp_path, "--overwrite") == 1
    assert f"error: --out {tmp_path} is a folder; name a file\n" in capsys.readouterr().err


@COMMANDS
@pytest.mark.parametrize("how", ["itself", "soft", "hard"])
@pytest.mark.parametrize("which", ["data", "weights"])
def test_an_input_is_never_written_over(world, tmp_path, answers, capsys, command, how, which):
    """Under whatever name it is given, and with --overwrite too."""
    model = shutil.copytree(world / "model", tmp_path / "copy" / "model")
    out = given = answers if which == "data" else model / "model.safetensors"
    if how != "itself":
        out = tmp_path / "link"
        out.symlink_to(given) if how == "soft" else out.hardlink_to(given)
    before = contents(tmp_path)
    assert command(tmp_path / "copy", answers, out, "--overwrite") == 1
    said = f"error: --out {out} is the input {given}; name another file\n"
    assert capsys.readouterr().err == said
    assert contents(tmp_path) == before and out.is_symlink() == (how == "soft")


def test_the_settings_of_generate_are_not_written_over_its_data(world, tmp_path):
    data = write(tmp_path / "out.jsonl.settings.json", [{"prompt": "Who?"}])
    before = contents(tmp_path)
    assert generated(world, data, tmp_path / "out.jsonl") == 1
    assert contents(tmp_path) == before


def test_the_small_world_writes_over_no_model(world, tmp_path, capsys):
    model = shutil.copytree(world / "model", tmp_path / "model")
    before = contents(model)
    out = model / "config.json"
    command = ["pairs", "--model", model, "--kind", "qa", "--count", "1", "--out", out]
    assert smallworld([str(word) for word in command]) == 1
    assert f"--out {out} lies in --model {model}" in capsys.readouterr().err
    assert smallworld(["base", "--out", str(model)]) == 1
    assert f"--out {model} is not empty" in capsys.readouterr().err
    assert contents(model) == before


# ------------------------------------------------------------------------------------ out of memory


def exhausted(*_, **__):
    """Asks for more than a machine can have: raises what PyTorch does on a CPU."""
    torch.empty(2**45)


@pytest.mark.parametrize(
    "error, is_it",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. ..."), True),
        (MemoryError(), True),
        (RuntimeError("unable to mmap 536 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 B."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_running_out_of_memory_is_recognised(error, is_it):
    with pytest.raises(MemoryError if is_it else type(error)) as found, memory_advice("do less"):
        raise error
    if is_it:
        text = str(found.value)
        assert text.startswith("out of memory; do less (") and "\n" not in text
    else:
        assert found.value is error


def said_once(capsys, *parts):
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory; ") and error.count("\n") == 1
    assert all(part in error for part in parts) and "damaged" not in error
    return True


def test_too_little_memory_for_a_step_or_to_resume(world, tmp_path, monkeypatch, capsys):
    """Each is one line that advises, and the run goes on to the end it would have come to."""
    out, flags = tmp_path / "run", ["--lr", 1e-3, "--save-every", 2, *CPU]
    assert main(arguments(world, tmp_path / "whole", *flags)) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        few = lambda step, *rest: exhausted() if step == 3 else learning_rate(step, *rest)
        patch.setattr("minibnf.train.learning_rate", few)
        assert main(arguments(world, out, *flags)) == 1
    assert said_once(capsys, "--max-tokens (now its default)", "--gradient-checkpointing")
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "load_state_dict", exhausted)
        more = ["--max-tokens", "200", "--gradient-checkpointing"]
        assert main(["--resume", "--out", str(out), *more]) == 1
    assert said_once(capsys, "--max-tokens (now 200) (")
    assert main(["--resume", "--out", str(out)]) == 0
    assert "resumed  after step 2" in capsys.readouterr().out
    assert same(weights(out), weights(tmp_path / "whole"))


def test_too_little_memory_to_evaluate_or_to_generate(
    world, tmp_path, answers, monkeypatch, capsys
):
    out = tmp_path / "out.json"
    monkeypatch.setattr("minibnf.evaluate.read_responses", exhausted)
    monkeypatch.setattr("minibnf.generate._prefill", exhausted)
    assert evaluated(world, answers, out, "--max-tokens", 99) == 1
    assert said_once(capsys, "lower --max-tokens (now 99)") and not out.exists()
    assert evaluated(world, answers, out) == 1
    assert said_once(capsys, "lower --max-tokens (now its default)")
    assert generated(world, answers, out, "--batch-size", 7) == 1
    assert said_once(capsys, "lower --batch-size (now 7)")


# ----------------------------------------------------------------------------- a damaged checkpoint


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """A function that loads it, and the folder of a checkpoint after one step of Muon and AdamW."""
    out = tmp_path_factory.mktemp("saved")
    args = parse(arguments(world, out, "--optimizer", "muon"))
    model = fresh(world / "model", seed=0)
    optims = optimizers(model, args, 1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optim in optims:
        optim.step()
    save_training(out, 3, 70, model, optims)
    return lambda: load_training(out, model, optims), out / "checkpoints" / "step-0000003"


@FEW
@given(data=st.data())
@pytest.mark.parametrize(
    "name", [f"{x}.safetensors" for x in ("model", "optimizer-0", "optimizer-1", "state")]
)
def test_a_file_that_is_cut_or_missing_is_called_damaged(saved, name, data):
    read, folder = saved
    assert read() == (3, 70)
    whole = (folder / name).read_bytes()
    kept = data.draw(st.none() | st.integers(0, len(whole.rstrip()) - 1), label="bytes kept")
    try:
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(whole[:kept])
        with pytest.raises(OSError, match=r"step-0000003: damaged .*starts anew"):
            read()
    finally:
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize(
    "seal, shape, says",
    [
        ("step-0000003", (1,), "holds other tensors than the model has"),
        ("step-0000003", (), "holds other tensors than the model has"),
        ("", (32,), "model.safetensors is not what was written"),
        ("step-0000002", (32,), "model.safetensors is not what was written"),
    ],
)
def test_weights_that_no_run_wrote_are_called_damaged(saved, seal, shape, says):
    """Under a hash that is right, even of a shape that PyTorch would copy into each row."""
    read, folder = saved
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    state = load_file(file) | {"model.norm.weight": torch.ones(shape)}
    file.unlink()  # not written in place: what was read may be mapped to it
    write_tensors(file, state, seal)
    with pytest.raises(OSError, match=says):
        read()
    file.unlink()
    file.write_bytes(whole)


def test_what_is_kept_is_what_was_saved_last(world, tmp_path, capsys):
    """And the newest before it; damaged ones of later steps go once it is there."""
    args = parse(arguments(world, tmp_path))
    model = fresh(world / "model", seed=0)
    optims = optimizers(model, args, 1e-3)
    save_training(tmp_path, 7, 70, model, optims)
    for later in ("step-0000014", "step-0000021"):  # of a name that is not theirs
        shutil.copytree(tmp_path / "checkpoints" / "step-0000007", tmp_path / "checkpoints" / later)
    assert load_training(tmp_path, model, optims) == (7, 70)
    assert capsys.readouterr().out.count("damaged or unreadable") == 2
    for step, kept in ((8, [7, 8]), (9, [8, 9])):
        save_training(tmp_path, step, 80, model, optims)
        names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert names == [f"step-{k:07d}" for k in kept]
    assert load_training(tmp_path, model, optims) == (9, 80)


def test_what_is_saved_is_on_the_disk_before_it_is_renamed_and_before_the_older_goes(
    world, run, monkeypatch
):
    """A power cut forgets what was not flushed: files, and the names in a folder.

    Every file was flushed before it, or a folder that it lies in, is renamed; and nothing is
    deleted in a folder that was renamed, or beside it, until the names around it were flushed.
    """
    flushed, moved, seen = set(), set(), []

    def fsync(opened, real=os.fsync):
        flushed.add(os.fstat(opened).st_ino)
        moved.discard(os.fstat(opened).st_ino)
        return real(opened)

    def rename(source, target, real=os.rename):
        inner = [source, *Path(source).rglob("*")] if "deleted" not in str(target) else []
        assert all(os.stat(path).st_ino in flushed for path in inner), (source, target)
        real(source, target)
        moved.add(os.stat(Path(target).parent).st_ino)
        seen.append(Path(target).name)

    def unlink(path, *rest, real=os.unlink, **how):
        if ".lock" not in str(path):
            assert not moved, path
        return real(path, *rest, **how)

    for name, call in {
        "fsync": fsync,
        "rename": rename,
        "replace": rename,
        "unlink": unlink,
    }.items():
        monkeypatch.setattr(os, name, call)
    flags = ["--max-steps", 3, "--save-every", 1, "--overwrite", *CPU]
    assert main(arguments(world, run, *flags)) == 0
    assert {"config.json", "model", "step-0000003", ".model.deleted.tmp"} <= set(seen)
    assert {os.stat(path).st_ino for path in (run / "model").iterdir()} <= flushed
    assert os.stat(run / "metrics.jsonl").st_ino in flushed


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"a": {"b": 1, "c": 2, "b": 3}}')
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON: key 'b' stands twice"):
        read_json(tmp_path / "config.json")


def test_a_generate_stopped_before_its_settings_goes_on_and_has_a_lock(
    world, tmp_path, answers, capsys
):
    out = tmp_path / "out.jsonl"
    out.write_text("")
    with locked(tmp_path / ".out.jsonl.lock"):
        assert generated(world, answers, out, "--resume") == 1
    assert f"is in use by another process ({os.getpid()} on" in capsys.readouterr().err
    assert generated(world, answers, out, "--resume") == 0
    assert out.read_text().count("\n") == 1
