"""The trainer: equal however a batch is split, bitwise the same when run again or resumed, clear
when something is wrong."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from minibnf import kernels, train
from minibnf.data import mismatched, pack, pair, read_examples
from minibnf.files.safetensors import fingerprint, write_tensors
from minibnf.files.tokenizer import load_tokenizer
from minibnf.lab.language import QUESTIONS, grammar
from minibnf.lab.smallworld import write_base
from minibnf.losses import LOSSES, bnf_weight
from minibnf.model import fresh, load, save
from minibnf.run import training_curves
from minibnf.step import (
    batch_logps, kl_estimate, metrics, run_batches, with_reference,
)  # fmt: skip
from minibnf.arguments import default_rate, loss_hyper
from minibnf.train import learning_rate, main, optimizers
from tests.faults.runs import drawn_at_once
from tests.faults.trials import end, start
from tests.strategies import HANDFUL, examples, hypers


def said(role, content):
    return [{"role": role, "content": content}]


def rows(count=24):
    """Pairs: a helpful answer over a rude one, about the people of the small world."""
    found = []
    for question, about in list(QUESTIONS.items())[:count]:
        styles = grammar(*about)
        chosen, rejected = (said("assistant", styles[kind][0]) for kind in ("helpful", "rude"))
        found.append({"prompt": said("user", question), "chosen": chosen, "rejected": rejected})
    return found


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def base(folder, scale=1, **shape):
    """Writes a random model of the small world, of another shape, its matrices scaled."""
    write_base(folder)
    config = json.loads((folder / "config.json").read_text()) | shape
    (folder / "config.json").write_text(json.dumps(config))
    model = fresh(folder, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale if p.dim() == 2 else 1)
    save(model, folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a random model of the small world's shape, pairs, unpaired rows and held-out
    pairs. Meanwhile runs draw no figures: that takes twice as long as such a run."""
    folder = tmp_path_factory.mktemp("world")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    base(folder / "model", **shape)
    write(folder / "pairs.jsonl", rows())
    write(folder / "held-out.jsonl", rows(30)[24:])
    unpaired = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows()
        for side in ("chosen", "rejected")
    ]
    write(folder / "unpaired.jsonl", unpaired)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "training_curves", drawn_at_once)
        yield folder


def arguments(world, out, *more, data="pairs.jsonl"):
    words = f"--model {world / 'model'} --data {world / data} --out {out} --batch-size 6"
    return [*words.split(), "--device", "cpu", *map(str, more)]


def trained(world, out, flags="", data="pairs.jsonl"):
    """The exit status of the trainer."""
    return main(arguments(world, out, *flags.split(), data=data))


def resumed(out, flags=""):
    return main(["--resume", "--out", str(out), *flags.split()])


def all_packed(examples, max_tokens=200):
    return pack(examples, list(range(len(examples))), max_tokens)


def shifted(examples, change):
    """The examples, with another reference."""
    return [e._replace(ref_logps=tuple(map(change, e.ref_logps))) for e in examples]


def logged(out, *, speeds=True):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if speeds or not k.endswith("_per_s")} for row in rows]


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------------------- one step


@HANDFUL
@given(found=examples(), data=st.data())
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_and_gradient_do_not_depend_on_how_a_batch_is_split(
    tiny, tmp_path_factory, name, found, data
):
    loss = LOSSES[name]
    if loss.needs_pairs:
        found = [e for e in found if e.pairs] or [pair(found[0].prompt, (1, 2), (3,), 1)]
    hyper = data.draw(hypers(loss))
    file = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    if loss.needs_ref:  # one that is not the policy itself
        found = with_reference(tiny, found, [all_packed(found)], file, loss, torch.float64)
        found = shifted(found, lambda x: x.double().sub(0.1).mul(0.9))

    def step(max_tokens):
        tiny.zero_grad()
        batches = all_packed(found, max_tokens)
        value, sums = run_batches(tiny, batches, loss, hyper, torch.float64, backward=True)
        gradient = [p.grad.clone() for p in tiny.parameters()]
        measured = metrics(batches, sums, hyper.get("beta", 1.0))
        numbers = {k: x.item() for k, x in measured.items()}
        # of two equal responses either may be ahead by a rounding
        numbers.pop("rewards/accuracies", None)
        return value, gradient, numbers

    value, gradient, numbers = step(10**6)
    value_split, gradient_split, numbers_split = step(max(e.tokens for e in found))
    torch.testing.assert_close(value, value_split, rtol=1e-9, atol=1e-12)
    for a, b in zip(gradient, gradient_split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert numbers == pytest.approx(numbers_split)


def test_metrics_by_hand():
    """Two pairs in two micro-batches; β = 1/2. Shifts: chosen +1, -2; rejected -3, -2; margins (4,
    0)/2."""
    batch = SimpleNamespace(preferred=torch.tensor([True, False]), pairs=torch.tensor([[0, 1]]))
    sums = torch.tensor([[-5.0, -7.0, -6.0, -9.0], [1.0, -3.0, -2.0, -2.0]])
    logps = {"logps/chosen": -5.5, "logps/rejected": -8.0}
    rewards = {"rewards/chosen": -0.25, "rewards/rejected": -1.25}
    pairs = {"rewards/margins": 1.0, "rewards/accuracies": 0.5}
    assert metrics([batch, batch], sums, 0.5) == pytest.approx(logps | rewards | pairs)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_shrinks_the_layers_matrices_and_nothing_else(tiny, optimizer):
    """Without a gradient a step of rate .1 and decay .5 is a factor of 1 - .1 * .5; Muon takes the
    same rate."""
    model = copy.deepcopy(tiny).float()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optim in optimizers(model, Namespace(optimizer=optimizer, weight_decay=0.5), 0.1):
        optim.step()
    for name, p in model.named_parameters():
        decays = name.startswith("model.layers.") and name.endswith("proj.weight")
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if decays else 1.0))


def test_the_learning_rate_rises_stays_and_falls():
    args = Namespace(warmup=0.2, decay=0.5)
    rates = [learning_rate(step, 10, 1.0, args) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_loss_arguments():
    assert loss_hyper(LOSSES["dpo"], ["beta=2"]) == {"beta": 2.0, "lam": 0.0}
    assert loss_hyper(LOSSES["bnf"], ["length=own"]) == {"length": "own"}
    for loss, texts in {"dpo": ["beta=1", "beta=2"], "kto": ["kl=1"], "bnf": ["length"]}.items():
        with pytest.raises(ValueError, match="write NAME=X"):
            loss_hyper(LOSSES[loss], texts)


# -------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_run_learns_and_leaves_what_it_promises(world, tmp_path, name, capsys):
    out = tmp_path / "run"
    flags = f"--loss {name} --epochs 3 --lr 3e-3 --eval-data {world / 'held-out.jsonl'}"
    assert trained(world, out, flags) == 0
    found = logged(out)
    steps, held_out = [r for r in found if "loss" in r], [r for r in found if "eval_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["step"] for r in held_out] == [0, 12]
    assert held_out[1]["eval_loss"] < held_out[0]["eval_loss"]
    needed = "step epoch loss grad_norm learning_rate num_tokens logps/chosen logps/rejected"
    needed += " examples_per_s tokens_per_s"
    if LOSSES[name].needs_ref:
        needed += " rewards/chosen rewards/rejected rewards/margins rewards/accuracies"
        assert held_out[1]["eval_rewards/accuracies"] > 0.8
    assert all(set(needed.split()) == set(r) for r in steps)
    before, after = load(world / "model"), load(out / "model")
    assert not torch.equal(before.unembed, after.unembed)
    assert list((out / "checkpoints").iterdir()) == [out / "checkpoints" / "step-0000012"]
    tokenizer = load_tokenizer(out / "model")
    assert tokenizer.encode("Hi") == load_tokenizer(world / "model").encode("Hi")
    assert name in (out / "model" / "README.md").read_text() and (out / "config.json").is_file()
    text = capsys.readouterr().out
    told = ["machine  cpu, float32", "12 of 6 examples: 3 epochs", str(out / "model"), "eval_loss"]
    assert all(words in text for words in told)
    assert (out / "figures" / "training.png").is_file()


def test_unpaired_rows_and_a_stop_in_mid_epoch(world, tmp_path, capsys):
    assert trained(world, tmp_path / "run", "--max-steps 5", data="unpaired.jsonl") == 0
    last = logged(tmp_path / "run")[-1]
    assert last["step"] == 5 and last["epoch"] == 5 / 8
    assert "rewards/chosen" in last and "rewards/margins" not in last
    assert "first step -> " in capsys.readouterr().out  # of what the numbers are


def test_run_again_is_bitwise_the_same_and_a_seed_makes_another(world, tmp_path):
    for out, seed in {"a": 0, "b": 0, "c": 1}.items():
        assert trained(world, tmp_path / out, f"--lr 1e-3 --max-tokens 120 --seed {seed}") == 0
    a, b, c = (weights(tmp_path / out) for out in "abc")
    assert same(a, b) and not same(a, c)


def test_gradient_checkpointing_changes_no_bit_and_keeps_a_fraction(
    world, tmp_path, tiny, monkeypatch
):
    for out, flag in {"plain": "", "again": "--gradient-checkpointing"}.items():
        assert trained(world, tmp_path / out, f"--lr 1e-3 --max-steps 3 {flag}") == 0
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "again"))

    def kept() -> int:
        sizes = {}
        pack = lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            tiny(torch.ones(1, 200, dtype=torch.int64), head=lambda x, _: x)
        return sum(sizes.values())

    everything = kept()
    monkeypatch.setattr(tiny, "recompute", True)
    assert kept() < everything / 3


GOLDEN = {
    "bnf": "0.083675 -0.016465 -0.078753 -0.116448 -0.208638"
    " -0.245358 -0.278455 -0.278928 -0.305817 -0.308658",
    "dpo": "0.693147 0.647883 0.612401 0.601424 0.558392"
    " 0.511223 0.510931 0.488424 0.49247 0.476756",
}


@pytest.mark.parametrize("loss", GOLDEN)
def test_ten_golden_losses(world, tmp_path, loss):
    """What weights/tiny's ten steps came to before the kernels were made fast (commit 381e75f):
    speed has changed no number."""
    data = write(tmp_path / "pairs.jsonl", rows(40))
    flags = f"--model weights/tiny --data {data} --lr 1e-3 --batch-size 8 --max-steps 10"
    assert trained(world, tmp_path / "run", f"{flags} --loss {loss}") == 0
    golden = [float(number) for number in GOLDEN[loss].split()]
    found = [row["loss"] for row in logged(tmp_path / "run")]
    assert found == pytest.approx(golden, rel=1e-4, abs=2e-5)


def test_bfloat16_keeps_float32_masters_and_stays_near_float32(world, tmp_path):
    for dtype in ("float32", "bfloat16"):
        assert trained(world, tmp_path / dtype, f"--lr 1e-3 --epochs 2 --dtype {dtype}") == 0
    wide, low = logged(tmp_path / "float32"), logged(tmp_path / "bfloat16")
    assert weights(tmp_path / "bfloat16")["model.norm.weight"].dtype == torch.float32
    for a, b in zip(wide, low, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.05)
    assert low[-1]["rewards/margins"] == pytest.approx(wide[-1]["rewards/margins"], rel=0.1)


def test_the_reference_is_computed_once(world, tmp_path, monkeypatch):
    model, examples = load(world / "model"), pack_examples(world)[:6]
    file = tmp_path / "reference.safetensors"

    def first():
        steps = [all_packed(examples)]
        found = with_reference(model, examples, steps, file, LOSSES["bnf"], torch.float32)
        return pack(found, [4, 1, 3], 1000)[0]

    batch = first()
    expected = batch_logps(model, batch, LOSSES["bnf"], torch.float32)
    torch.testing.assert_close(batch.ref_logps, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("minibnf.step.read_all", lambda *_: pytest.fail("computed again"))
    assert torch.equal(first().ref_logps, batch.ref_logps)
    file.write_bytes(b"junk")
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        first()


@pytest.fixture(scope="module")
def wide(world, tmp_path_factory):
    """A random model wide enough that a product rounds otherwise when it has more rows, with a
    sharp distribution."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 64}
    return base(tmp_path_factory.mktemp("wide") / "model", scale=3, **shape)


def first_epoch(wide, world, out, monkeypatch, loss, dtype, device):
    """The rows of metrics of one epoch at a rate that changes nothing, held-out rows at both ends;
    and of every token of training its log-probability under the policy and that under the
    reference."""
    logps, ref_logps, real = [], [], train.run_batches

    def spy(model, batches, loss, hyper, dtype, *, backward):
        value, sums = real(model, batches, loss, hyper, dtype, backward=backward)
        if backward:
            with torch.no_grad():
                logps.extend(batch_logps(model, b.to(device), loss, dtype) for b in batches)
            ref_logps.extend(b.ref_logps.to(device) for b in batches)
        return value, sums

    monkeypatch.setattr(train, "run_batches", spy)
    flags = f"--model {wide} --loss {loss} --dtype {dtype} --device {device} --lr 1e-30"
    flags += f" --max-tokens 90 --seed 3 --eval-data {world / 'held-out.jsonl'}"
    assert trained(world, out, flags) == 0
    return logged(out), torch.cat(logps), torch.cat(ref_logps)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", ["bnf", "dpo", "kto"])
def test_before_anything_is_learnt_the_policy_is_the_reference(
    wide, world, tmp_path, monkeypatch, loss, dtype
):
    """Every weight of BNF is then 1, DPO's loss log 2 and every shift 0, in all batches of the
    first epoch and for held-out rows: exactly, for the reference is read in the same packs by the
    same arithmetic."""
    out = tmp_path / "run"
    rows, logps, ref_logps = first_epoch(wide, world, out, monkeypatch, loss, dtype, "cpu")
    assert len(rows) == 6 and torch.equal(logps, ref_logps)  # four steps, two evaluations
    for row in rows:
        prefix = "eval_" if "eval_loss" in row else ""
        assert row[f"{prefix}rewards/chosen"] == row[f"{prefix}rewards/rejected"] == 0
        assert row[f"{prefix}rewards/accuracies"] == 0  # all tie
        if loss == "dpo":
            assert row[f"{prefix}loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, least", [("float32", 0.9999), ("bfloat16", 0.99)])
def test_on_a_gpu_bnfs_weights_begin_near_one(wide, world, tmp_path, monkeypatch, dtype, least):
    out = tmp_path / "run"
    _, logps, ref_logps = first_epoch(wide, world, out, monkeypatch, "bnf", dtype, "cuda")
    assert bnf_weight(logps, ref_logps).mean() > least


def test_the_fingerprint_sees_a_permutation(world):
    """Such as the one by which GGUF stores the rows of q and k."""
    model = load(world / "model")
    before = fingerprint(model.named_parameters())
    assert fingerprint(load(world / "model").named_parameters()) == before
    with torch.no_grad():
        q = model.model.layers[0].self_attn.q_proj.weight
        q.copy_(q.flip(0))
    assert fingerprint(model.named_parameters()) != before


def test_the_kl_estimate_is_the_clamped_mean_shift_of_what_it_is_given(world, tmp_path):
    examples, model = pack_examples(world)[:4], load(world / "model")
    moved, _ = mismatched(examples, 256, "file")
    kto, file = LOSSES["kto"], tmp_path / "ref.safetensors"
    moved = with_reference(model, moved, [all_packed(moved)], file, kto, torch.float32)

    def estimate(surer):
        """As if the policy had become surer of each token by so many nats."""
        batches = pack(shifted(moved, lambda x: x - surer), [0, 2, 3], 60)
        return kl_estimate(model, batches, kto, torch.float32).item()

    assert estimate(0) == pytest.approx(0, abs=1e-5)
    tokens = sum(len(r) for i in (0, 2, 3) for r in moved[i].responses)
    assert estimate(0.25) == pytest.approx(0.25 * tokens / 6, rel=1e-4)
    assert estimate(-0.25) == 0


def test_ktos_reference_point_comes_from_mismatched_responses(world, tmp_path, monkeypatch):
    """Every step's, and the evaluation's, estimate is over responses under prompts that are not
    their own."""
    seen, own = 0, {(e.prompt, r) for e in pack_examples(world) for r in e.responses}

    def spy(model, batches, *how):
        nonlocal seen
        for b in batches:
            tokens, targets = b.tokens[0].tolist(), iter(b.targets.split(b.lengths.tolist()))
            for prompt, lengths in b.layout:
                prompt, tokens = tuple(tokens[:prompt]), tokens[prompt + sum(lengths) :]
                assert not own & {(prompt, tuple(next(targets).tolist())) for _ in lengths}
                seen += 1
        return kl_estimate(model, batches, *how)

    monkeypatch.setattr("minibnf.train.kl_estimate", spy)
    assert trained(world, tmp_path / "run", "--loss kto") == 0
    assert seen == 24


def pack_examples(world):
    return read_examples(world / "pairs.jsonl", load_tokenizer(world / "model"), 256)[0]


def test_from_scratch_with_muon(world, tmp_path):
    """A fresh model needs no weights in its folder; Muon and AdamW share the parameters and their
    state survives."""
    (tmp_path / "base").mkdir()
    for file in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "base" / file).write_bytes((world / "model" / file).read_bytes())
    flags = f"--model {tmp_path / 'base'} --from-scratch --loss nll --optimizer muon --lr 3e-3"
    assert trained(world, tmp_path / "run", f"{flags} --epochs 4", data="unpaired.jsonl") == 0
    found = logged(tmp_path / "run")
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]


# ------------------------------------------------------------------------------------ interruptions


def begun(world, out, lines):
    """A long run in a fork of this process, which is warm, and has logged so many lines."""
    place = out.with_name("said")
    place.mkdir()
    flags = [*LONG.split(), "--eval-data", world / "held-out.jsonl"]
    pid = start(main, arguments(world, out, *flags), place)
    deadline, log = time.monotonic() + 60, out / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < lines:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline
        time.sleep(0.002)
    return pid, place


def killed(world, out, lines, number=signal.SIGKILL):
    """The exit status of a long run that is sent a signal, and what it said on stderr."""
    pid, place = begun(world, out, lines)
    os.kill(pid, number)
    ended = end(pid, place)
    return ended.status, ended.err


LONG = (
    "--lr 1e-3 --epochs 15 --save-every 7 --loss bnf --optimizer muon --max-tokens 150"
    " --eval-every 10"
)


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert trained(world, out, f"{LONG} --eval-data {world / 'held-out.jsonl'}") == 0
    return out


@pytest.mark.parametrize("step", [1, 30])
def test_killed_and_resumed_ends_bitwise_as_if_never_killed(
    world, tmp_path, uninterrupted, step, capsys
):
    out = tmp_path / "run"
    killed(world, out, step)
    assert not (out / "model").exists()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')  # a torn line
    assert resumed(out, "--lr 1") == 1
    assert "cannot resume, lr was 0.001 and is 1.0 now" in capsys.readouterr().err
    assert resumed(out) == 0
    assert same(weights(out), weights(uninterrupted))
    assert logged(out, speeds=False) == logged(uninterrupted, speeds=False)
    assert resumed(out) == 0 and "it is finished: its model is" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_go_on(world, tmp_path, uninterrupted, number):
    out = tmp_path / "run"
    code, errors = killed(world, out, 10, number)
    assert code == 130 and "Traceback" not in errors
    assert f"-m minibnf.train --resume --out {out}" in errors
    done = sum("loss" in row for row in logged(out))
    newest = max((out / "checkpoints").glob("*/state.safetensors"))
    assert load_file(newest)["step"] == done
    (out / "reference-train.safetensors").write_bytes(b"junk")  # damaged: it is made again
    assert resumed(out) == 0
    assert same(weights(out), weights(uninterrupted))


def test_resuming_something_else_is_refused(world, tmp_path, capsys):
    out, other = tmp_path / "run", tmp_path / "other"
    assert trained(world, out, "--max-steps 1") == 0
    save(fresh(world / "model", seed=5), other)
    load_tokenizer(world / "model").save(other)
    assert resumed(out, f"--model {other}") == 1
    assert "cannot resume, model_sha256 was" in capsys.readouterr().err
    assert resumed(out, "--loss dpo") == 1


class NextYear(datetime):
    @classmethod
    def now(cls):
        return cls(2040, 1, 1)


def test_a_dated_template_is_resumed_with_the_date_of_the_first_run(world, tmp_path, monkeypatch):
    shutil.copytree(world / "model", tmp_path / "model")
    template = json.loads((world / "model" / "tokenizer_config.json").read_text())["chat_template"]
    dated = tmp_path / "model" / "chat_template.jinja"
    dated.write_text("<|system|>{{ strftime_now('%d %B %Y') }}<|end|>" + template)
    out, flags = tmp_path / "run", f"--max-steps 2 --model {tmp_path / 'model'}"
    assert trained(world, out, flags) == 0
    first = weights(out)
    shutil.rmtree(out / "model")  # as if interrupted before it was written
    monkeypatch.setattr("minibnf.files.tokenizer.datetime", NextYear)
    assert resumed(out) == 0
    assert same(weights(out), first)
    assert trained(world, out, f"{flags} --overwrite") == 0
    assert json.loads((out / "config.json").read_text())["facts"]["now"].startswith("2040-01-01")


def test_a_closing_token_that_other_programs_do_not_stop_at_is_told(world, tmp_path, capsys):
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert trained(world, tmp_path / "run", f"--max-steps 1 --model {tmp_path / 'model'}") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "closes turns with <|end|> (2)" in warnings[0]


# ---------------------------------------------------------------------------------- what goes wrong


def test_a_folder_that_holds_a_run_is_refused_and_an_earlier_config_can_be_changed(
    world, tmp_path, capsys
):
    out, other = tmp_path / "run", tmp_path / "other"
    assert trained(world, out, "--max-steps 2") == 0
    assert trained(world, out, "--max-steps 2") == 1
    assert "--resume goes on with it, --overwrite deletes it" in capsys.readouterr().err
    config = f"--config {out / 'config.json'}".split()
    assert main([*config, "--overwrite", "--epochs", "1"]) == 0
    assert logged(out)[-1]["step"] == 4
    assert main([*config, "--out", str(other), "--loss", "dpo"]) == 0
    assert logged(other)[-1]["step"] == 4
    found = json.loads((other / "config.json").read_text())
    assert found["arguments"]["loss"] == "dpo" and found["arguments"]["lr"] is None
    # the other loss's own, not the first one's
    assert found["facts"]["lr"] == default_rate("dpo") * 576 / 32
    assert main(["--config", str(world / "model" / "config.json"), "--out", str(out)]) == 1
    assert "not the config.json that a run" in capsys.readouterr().err


def test_a_bad_input_does_not_cost_the_run_that_overwrite_would_replace(world, tmp_path, capsys):
    """A file that is missing, and rows that have not what kto asks for."""
    out, one = tmp_path / "run", write(tmp_path / "one.jsonl", rows(1))
    assert trained(world, out, "--max-steps 2") == 0
    assert trained(world, out, f"--overwrite --data {tmp_path / 'missing.jsonl'}") == 1
    assert trained(world, out, f"--overwrite --loss kto --data {one}") == 1
    assert "one.jsonl, line 1: kto" in capsys.readouterr().err
    assert (out / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "flags",
    ["--lr inf", "--lr 0", "--batch-size 0", "--eval-every 2", "--epochs 1 --max-steps 1"],
)
def test_impossible_arguments_are_refused_in_one_line(world, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as exit:
        trained(world, tmp_path / "run", flags)
    assert exit.value.code == 2 and not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert error.endswith(" (minibnf train --help lists the options)\n")


@pytest.mark.parametrize("broken", [False, True])
def test_numbers_read_a_step_late_are_the_same_numbers(
    world, tmp_path, monkeypatch, capsys, broken
):
    """As on CUDA; evaluations and checkpoints stand between steps. Broken: a number that is not
    finite is noticed late too."""
    if broken:
        nan_at_2 = lambda step, *rest: math.nan if step == 2 else learning_rate(step, *rest)
        monkeypatch.setattr("minibnf.train.learning_rate", nan_at_2)
    found = []
    flags = f"--max-steps 6 --eval-every 4 --save-every 5 --eval-data {world / 'pairs.jsonl'}"
    for late in ("", "cpu"):
        monkeypatch.setattr("minibnf.run.LATE", {late})
        out = tmp_path / f"late-{late}"
        assert trained(world, out, flags) == broken
        assert not (broken and ((out / "checkpoints").exists() or (out / "model").exists()))
        found.append(logged(out, speeds=False))
    assert found[0] == found[1]
    expected = [0, 1, 2, 3] if broken else [0, 1, 2, 3, 4, 4, 5, 6, 6]
    assert [row["step"] for row in found[0]] == expected
    assert capsys.readouterr().err.count("stopped at step 4") == 2 * broken


def test_a_full_disk_is_an_error_for_people(world, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("minibnf.files.safetensors.save_file", full)
    assert trained(world, tmp_path / "run", "--max-steps 1 --loss nll") == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert "model.safetensors cannot be written" in errors and "No space left" in errors


def test_folders_that_hold_no_run_or_a_damaged_one(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert trained(world, out, "--max-steps 1") == 0
    shutil.rmtree(out / "model")
    (checkpoint,) = (out / "checkpoints").iterdir()
    (checkpoint / "model.safetensors").write_bytes(b"junk")
    assert resumed(out) == 1
    assert f"{checkpoint}: damaged or unreadable" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        resumed(tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'} holds no run to go on with" in capsys.readouterr().err
    assert trained(world, tmp_path / "new", "--max-steps 1 --resume") == 0
    assert "holds no run to go on with: starting one" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert trained(world, tmp_path / "file" / "run") == 1
    assert f"'{tmp_path / 'file'}" in capsys.readouterr().err


def test_every_option_of_training_does_something(world, tmp_path):
    """Each changes the weights (or what is logged, or the stored dtype) against the same run
    without it."""
    assert trained(world, tmp_path / "plain", "--lr 3e-3") == 0
    options = (
        "--grad-clip 1e-3,--weight-decay 0.5,--warmup 0.9,--decay 0.2,--batch-size 5,"
        "--loss-args length=own,--optimizer muon"
    )
    for flags in options.split(","):
        out = tmp_path / flags.split()[0]
        assert trained(world, out, f"--lr 3e-3 {flags}") == 0
        assert not same(weights(out), weights(tmp_path / "plain")), flags
    other, held_out = tmp_path / "other", world / "held-out.jsonl"
    flags = f"--lr 3e-3 --save-dtype bfloat16 --eval-every 2 --eval-data {held_out}"
    assert trained(world, other, flags) == 0
    assert {t.dtype for t in weights(other).values()} == {torch.bfloat16}
    assert [row["step"] for row in logged(other) if "eval_loss" in row] == [0, 2, 4]


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--data {0}/json.jsonl", ["json.jsonl, line 3", "not valid JSON"]),
        ("--data {0}/empty.jsonl", ["empty.jsonl, line 3", "field 'rejected' is empty"]),
        ("--model {0}/model", ["model", "tensor 'model.norm.weight' is missing"]),
        ("--data {1}/unpaired.jsonl --loss dpo", ["line 1", "needs pairs", "(one of 48)"]),
        ("--max-tokens 10", ["--max-tokens 10", "the longest example has"]),
        ("--loss-args beta=1", ["'bnf'", "no hyper-parameter 'beta'"]),
    ],
)
def test_bad_inputs_give_one_clear_line_and_no_traceback(world, tmp_path, capsys, flags, parts):
    found = rows()
    found[2]["rejected"] = said("assistant", "")
    write(tmp_path / "empty.jsonl", found)
    with open(write(tmp_path / "json.jsonl", rows(2)), "a") as file:
        file.write('{"prompt": [\n')
    model = shutil.copytree(world / "model", tmp_path / "model")
    broken = fresh(model, seed=0)
    del broken.model.norm.weight
    save(broken, model)
    assert trained(world, tmp_path / "out", flags.format(tmp_path, world)) == 1
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith("error: ") and error.count("\n") == 1
    assert all(part in error for part in parts)
    assert not (tmp_path / "out").exists()


def test_a_non_finite_loss_stops_the_run_unsaved_and_names_the_batch(world, tmp_path, capsys):
    broken = altered(world, tmp_path / "broken", 3e38)
    assert trained(world, tmp_path / "run", f"--loss nll --model {broken}") == 1
    errors = capsys.readouterr().err
    for part in ("stopped at step 1: loss nan", "nothing of it was saved", "pairs.jsonl", "lines "):
        assert part in errors
    assert not (tmp_path / "run" / "model").exists() and logged(tmp_path / "run") == []
    assert not (tmp_path / "run" / "checkpoints").exists()


def altered(world, folder, number):
    """A copy of the model whose last norm holds this number."""
    model = load(world / "model")
    with torch.no_grad():
        model.model.norm.weight.fill_(number)
    save(model, folder)
    load_tokenizer(world / "model").save(folder)
    return folder


def no_line_but(capsys, *parts):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(part in error for part in parts), error
    return "Traceback" not in error


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_starting_weights_that_are_not_finite_are_named(world, tmp_path, capsys, number):
    broken = altered(world, tmp_path / "broken", number)
    assert trained(world, tmp_path / "run", f"--model {broken}") == 1
    assert no_line_but(capsys, f"{broken}/model.safetensors: tensor 'model.norm.weight' holds")
    assert not (tmp_path / "run").exists()


def test_a_reference_that_is_not_finite_is_no_training_rows_fault(world, tmp_path, capsys):
    broken = altered(world, tmp_path / "broken", 3e38)
    assert trained(world, tmp_path / "run", f"--model {broken}") == 1
    said = f"at step 0 in line 1 of {world / 'pairs.jsonl'} (weights too large? an odd row?): "
    assert no_line_but(capsys, said, "'the model's own log-probabilities'")


def test_held_out_rows_that_give_no_number_are_named_and_metrics_stay_json(
    world, tmp_path, capsys, monkeypatch
):
    def broken(*args, backward):
        loss, sums = run_batches(*args, backward=backward)
        return loss if backward else loss * math.nan, sums

    monkeypatch.setattr(train, "run_batches", broken)
    held_out = world / "held-out.jsonl"
    assert trained(world, tmp_path / "run", f"--eval-data {held_out}") == 1
    assert no_line_but(capsys, "stopped at step 0: eval_loss nan;", f"Its rows: all of {held_out}")
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_weights_that_are_not_finite_are_never_saved(world, tmp_path, capsys):
    """The loss of the only step was still that of the weights before it."""
    flags = "--loss nll --optimizer muon --lr 1e38 --weight-decay 1e30 --max-steps 1 --warmup 0"
    assert trained(world, tmp_path / "run", flags) == 1
    assert no_line_but(capsys, "stopped at step 1, unsaved; lower --lr: model: tensor '")
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


@pytest.fixture
def stopped(world, tmp_path):
    """A run of four steps, checkpoints after 2 and 4, killed before it wrote model/; and the
    weights that it would have had."""
    out = tmp_path / "run"
    assert trained(world, out, "--lr 1e-3 --save-every 2") == 0
    end = weights(out)
    shutil.rmtree(out / "model")
    return out, end


def flip(file, at):
    """One bit, at this share of the file."""
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 4
    file.unlink()  # what was read may be mapped to it
    file.write_bytes(data)


@pytest.mark.parametrize("at", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("name", ["model", "optimizer-0", "state"])
def test_a_flipped_bit_is_named_and_the_older_checkpoint_used(stopped, capsys, name, at):
    out, end = stopped
    flip(out / "checkpoints" / "step-0000004" / f"{name}.safetensors", at)
    capsys.readouterr()
    assert resumed(out) == 0
    said = capsys.readouterr().out
    assert "step-0000004: damaged or unreadable (" in said and "after step 2" in said
    assert same(weights(out), end)
    names = [path.name for path in sorted((out / "checkpoints").iterdir())]
    assert names == ["step-0000002", "step-0000004"]


def test_a_flipped_bit_of_the_reference_is_made_good(stopped):
    out, end = stopped
    shutil.rmtree(out / "checkpoints")
    before = (out / "reference-train.safetensors").read_bytes()
    flip(out / "reference-train.safetensors", 0.9)
    assert resumed(out) == 0
    assert same(weights(out), end)
    assert (out / "reference-train.safetensors").read_bytes() == before


def test_a_reference_of_another_run_is_made_anew(stopped):
    out, end = stopped
    shutil.rmtree(out / "checkpoints")
    file = out / "reference-train.safetensors"
    before = file.read_bytes()
    file.unlink()  # not written in place: what was read may be mapped to it
    write_tensors(file, {"logps": torch.zeros(3)}, seal="reference of 3 tokens")
    assert resumed(out) == 0
    assert same(weights(out), end) and file.read_bytes() == before


def test_the_announcement_says_what_disk_two_checkpoints_take(stopped, capsys):
    out, _ = stopped
    capsys.readouterr()
    assert resumed(out) == 0
    said = capsys.readouterr().out.partition("disk     at most ")[2].split()[0]
    size = sum(path.stat().st_size for path in out.glob("checkpoints/*/*.safetensors"))
    assert size / 1e6 == pytest.approx(float(said), rel=0.15)


@pytest.mark.parametrize("name", [".DS_Store", "step-best", "step-0000002.bak", "step-12"])
def test_what_others_put_among_the_checkpoints_is_neither_read_nor_deleted(stopped, name):
    out, end = stopped
    shutil.rmtree(out / "checkpoints" / "step-0000004")
    stray = out / "checkpoints" / name
    stray.write_text("mine") if name == ".DS_Store" else stray.mkdir()
    assert resumed(out) == 0
    assert same(weights(out), end) and stray.exists()


@pytest.mark.parametrize("damage", ["emptied", "deleted", "bad byte", "no object"])
def test_a_damaged_metrics_file_costs_its_rows_and_says_so(stopped, capsys, damage):
    out, end = stopped
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = b'{"\xff' + lines[1] if damage == "bad byte" else b"[2]\n"
    (out / "metrics.jsonl").write_bytes(
        b"".join(lines) if damage in ("bad byte", "no object") else b""
    )
    if damage == "deleted":
        (out / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert resumed(out) == 0
    gone = 4 if damage in ("emptied", "deleted") else 1
    said = f"metrics.jsonl: the rows of {gone} of 4 steps are damaged or gone"
    assert said in capsys.readouterr().out and same(weights(out), end)
    assert len(logged(out)) == 4 - gone


def test_a_second_process_is_refused_and_told_who_holds_the_run(
    world, tmp_path, uninterrupted, capsys
):
    """Whether it would go on or start anew; and the lock dies with its process."""
    out = tmp_path / "run"
    first, _ = begun(world, out, 9)
    os.kill(first, signal.SIGSTOP)  # it still holds the lock
    for flag in ("--resume", "--overwrite"):
        more = f"{LONG} --eval-data {world / 'held-out.jsonl'} {flag}"
        assert trained(world, out, more) == 1
        assert no_line_but(capsys, f"{out} is in use by another process ({first} on ")
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert resumed(out) == 0 and same(weights(out), weights(uninterrupted))
    assert not (out / ".lock").exists()


def test_an_out_that_is_no_utf_8_is_refused_at_once(world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        trained(world, tmp_path / os.fsdecode(b"run-\xff"))
    assert no_line_but(capsys, "run-\\udcff' is no UTF-8") and list(tmp_path.iterdir()) == []


def test_what_nobody_foresaw_keeps_its_traceback_and_asks_to_be_reported(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "optimizers", lambda *_: [][0])
    with pytest.raises(IndexError) as found:
        trained(world, tmp_path / "run")
    assert "This is a bug of minibnf. Please report it" in found.value.__notes__[0]


def test_a_terminal_that_cannot_be_written_to_is_no_reason_to_stop(world, tmp_path):
    command = [sys.executable, "-m", "minibnf.train", *arguments(world, tmp_path / "run")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    said = "standard output cannot be written: No space left on device; going on\n"
    assert done.stderr == said and done.returncode == 1
    assert (tmp_path / "run" / "model" / "README.md").exists()
    figure = (tmp_path / "run" / "figures" / "training.png").read_bytes()
    assert figure.startswith(b"\x89PNG")


@pytest.mark.parametrize("found", [[], [{"step": 1, "loss": 0.5, "logps/chosen": -3.0}]])
def test_a_figure_is_drawn_of_whatever_rows_there_are(tmp_path, found):
    training_curves(found, tmp_path / "figures" / "a.png", "a run")
    assert (tmp_path / "figures" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_that_cannot_be_written_are_named(world, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minibnf.run.open", full, raising=False)
    assert trained(world, tmp_path / "run", "--loss nll") == 1
    assert no_line_but(capsys, "metrics.jsonl cannot be written: No space left on device")


def test_no_line_of_an_error_is_endless_and_what_is_shown_controls_no_terminal(
    world, tmp_path, capsys
):
    found = [row | {"a\x1b[31m" + "b" * 20000: 1} for row in rows()]
    file = write(tmp_path / "pairs.jsonl", found)
    assert trained(world, tmp_path / "run", f"--data {file} --max-steps 1") == 0
    said = capsys.readouterr().out
    assert "a\\x1b[31mbbb" in said and "\x1b" not in said
    assert trained(world, tmp_path / "run2", f"--data {tmp_path / ('x' * 20000)}") == 1
    assert max(map(len, capsys.readouterr().err.splitlines())) < 1100


def test_a_resumed_run_keeps_the_library_and_the_threads_it_began_with(
    world, tmp_path, monkeypatch
):
    """Two processors' makers may choose otherwise, and other libraries or threads round so."""
    out, chosen, threads = tmp_path / "run", [], torch.get_num_threads()
    monkeypatch.setattr(train, "multiply_by", chosen.append)
    for library in ("oneDNN", "MKL"):
        monkeypatch.setattr(train, "fastest_library", lambda library=library: library)
        assert trained(world, out, "--max-steps 1 --resume") == 0
        torch.set_num_threads(threads + 1)
    try:
        assert resumed(out) == 0 and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    assert chosen == ["oneDNN"] * 3
    assert json.loads((out / "config.json").read_text())["facts"]["products"] == "oneDNN"


def test_what_a_run_compiled_is_not_used_after_it(world, tmp_path, monkeypatch):
    """A comparison examines the model in the same process."""
    monkeypatch.setattr(train, "train", lambda run: kernels.compile_by("eager"))
    assert trained(world, tmp_path / "run") == 0 and not kernels.compiling()
