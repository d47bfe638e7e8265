"""Kills, failing writes, power cuts, damage and company: what becomes of a run of three steps.

A trial prepares a folder, lets a run into it meet its fate, and goes on with --resume. It held if
the weights at the end are bitwise those of a run that nothing befell.
"""

import io
import json
import shutil
import time
from contextlib import redirect_stdout
from pathlib import Path
from random import Random

import torch

import minibnf.train
from minibnf.lab.language import QUESTIONS, grammar
from minibnf.model import fresh, save
from minibnf.train import main as train
from tests.faults import trials
from tests.faults.trials import Campaign, Ended, end, flip, kill, one_line, run, start

TINY = Path(__file__).parents[2] / "weights" / "tiny"
WORLD: dict = {}  # what make_world() leaves for the trials, which run in forks of this process


def message(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def make_world(folder: Path) -> None:
    """A small model, 24 pairs, and runs that nothing befell."""
    model = folder / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = json.loads((model / "config.json").read_text()) | shape
    (model / "config.json").write_text(json.dumps(config))
    save(fresh(model, seed=0), model)
    rows = []
    for question, about in list(QUESTIONS.items())[:24]:
        chosen, rejected = (
            message("assistant", grammar(*about)[k][0]) for k in ("helpful", "rude")
        )
        rows.append({"prompt": message("user", question), "chosen": chosen, "rejected": rejected})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    WORLD.update(folder=folder, model=model, pairs=folder / "pairs.jsonl", rows=rows)
    minibnf.train.training_curves = drawn_at_once
    torch.set_num_threads(1)
    for seed in (0, 1):  # in this process, which is warm then: PyTorch loads much with the first
        out = folder / f"seed-{seed}" / "run"
        with redirect_stdout(io.StringIO()):
            assert train([str(word) for word in words(out, "--seed", seed)]) == 0
        WORLD["end", seed] = weights(out)
    WORLD["finished"] = folder / "seed-0" / "run"
    WORLD["stopped"] = shutil.copytree(WORLD["finished"], folder / "stopped")
    shutil.rmtree(WORLD["stopped"] / "model")
    shutil.rmtree(WORLD["stopped"] / "checkpoints" / "step-0000003")
    WORLD["seconds"] = timed(folder / "timed")
    for name in SCENARIOS if trials.shim() else ():
        (folder / name).mkdir()
        ended = begin(name, folder / name, fault=(trials.NONE, 0))
        assert ended.status == 0, ended
        WORLD["calls", name] = ended.calls


def drawn_at_once(rows: list[dict], file: Path, title: str) -> None:
    """A file in the figure's place: to draw it takes three times as long as such a run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(title)


def timed(folder: Path) -> float:
    """The seconds that a new run takes."""
    folder.mkdir()
    began = time.perf_counter()
    run(train, words(folder / "run"), folder)
    return time.perf_counter() - began


def words(out: Path, *more) -> list:
    given = {"--model": WORLD["model"], "--data": WORLD["pairs"], "--out": out}
    how = "--max-steps 3 --save-every 1 --batch-size 6 --lr 1e-3 --device cpu".split()
    return [word for pair in given.items() for word in pair] + how + list(more)


def weights(out: Path) -> bytes:
    """The bytes of a finished run's weights; b"" where there are none."""
    file = out / "model" / "model.safetensors"
    return file.read_bytes() if file.exists() else b""


# What a run begins with, its flags, and the seeds whose ends it may come to when it goes on.
SCENARIOS = {
    "new": (None, [], [0]),
    "resume": ("stopped", ["--resume"], [0]),
    "overwrite": ("finished", ["--overwrite", "--seed", 1], [0, 1]),
}


def begin(name: str, folder: Path, fault=(), store="", wait=True) -> Ended | int:
    """A run of a scenario, into folder/work/run."""
    (before, flags, _), work = SCENARIOS[name], folder / "work"
    work.mkdir(exist_ok=True)
    if before and not (work / "run").exists():
        shutil.copytree(WORLD[before], work / "run")
    fault = (work, *fault, store) if fault else ()
    pid = start(train, words(work / "run", *flags), folder, fault=fault)
    return end(pid, folder) if wait else pid


def goes_on(folder: Path, out: Path, seeds: list[int]) -> str:
    """ "" where --resume comes to the end of one of the seeds, --overwrite to that of seed 1."""
    ended = run(train, words(out, "--resume"), folder)
    if ended.status and "seed was 1" in ended.err:
        ended = run(train, words(out, "--resume", "--seed", 1), folder)
    if ended.status:
        return f"--resume does not go on: {ended}"
    if weights(out) not in [WORLD["end", seed] for seed in seeds]:
        return "other weights at the end"
    if 1 in seeds:
        ended = run(train, words(out, "--overwrite", "--seed", 1), folder)
        if ended.status or weights(out) != WORLD["end", 1]:
            return f"--overwrite: {ended}"
    return ""


# ------------------------------------------------------------------------------------------ kills


def killed_at_random(k: int, random: Random, folder: Path):
    name = random.choice(list(SCENARIOS))
    pid = begin(name, folder, wait=False)
    time.sleep(random.uniform(0, 1.1 * WORLD["seconds"]))
    kill(pid)
    end(pid, folder)
    yield goes_on(folder, folder / "work" / "run", SCENARIOS[name][2])


def calls() -> int:
    return sum(WORLD["calls", name] for name in SCENARIOS)


def call_of(k: int) -> tuple[str, int]:
    """The scenario and the number of its call that k stands for."""
    for name in SCENARIOS:
        if k < WORLD["calls", name]:
            return name, k + 1
        k -= WORLD["calls", name]
    raise IndexError(k)


def killed_before_a_call(k: int, random: Random, folder: Path):
    name, at = call_of(k)
    ended = begin(name, folder, fault=(trials.KILL, at))
    if ended.status in (-9, 0):
        yield goes_on(folder, folder / "work" / "run", SCENARIOS[name][2])
    else:
        yield f"before call {at} of {name}: {ended}"


# ----------------------------------------------------------------------------------- failing calls

MODES = {
    trials.ONCE: "an error of the disk",
    trials.FULL: "a full disk",
    trials.HALF_THEN_FULL: "half of a write, then a full disk",
    trials.HALF: "half of a write",
}


def failing_call(k: int, random: Random, folder: Path):
    mode, at = [trials.ONCE, random.choice(list(MODES))][k % 2], k // 2 + 1
    ended = begin("new", folder, fault=(mode, at))
    where = f"{MODES[mode]} at call {at}"
    if ended.status == 0:
        same = weights(folder / "work" / "run") == WORLD["end", 0]
        yield "" if same else f"{where}: it ends with other weights"
    elif wrong := one_line(ended):
        yield f"{where}: {wrong}"
    else:
        wrong = goes_on(folder, folder / "work" / "run", [0])
        yield f"{where}: {wrong}" if wrong else ""


# -------------------------------------------------------------------------------------- power cuts


def power_cut(k: int, random: Random, folder: Path):
    """Before a call; what was not flushed is lost in one of three ways."""
    (name, at), way = call_of(k), random.randrange(3)
    if name == "resume":  # it makes the calls of a new run
        return
    work, store, left = (folder / x for x in ("work", "store", "left"))
    for place in (work, store):
        place.mkdir()
    if SCENARIOS[name][0]:
        shutil.copytree(WORLD[SCENARIOS[name][0]], work / "run")
    for path in [work, *work.rglob("*")]:  # what lay there is on the disk
        inode = path.stat().st_ino
        if path.is_dir():
            names = "".join(f"{x.stat().st_ino} {x.name}\n" for x in path.iterdir())
            (store / f"d{inode}").write_text(names)
        else:
            shutil.copyfile(path, store / f"c{inode}")
    begin(name, folder, fault=(trials.KILL, at), store=store)
    survive(work, store, left, way, random)
    had, has = saved(work / "run"), saved(left / "run")
    if len(had) > 1 and max(has, default="") < had[-2]:
        yield f"before call {at} of {name}: {had} were saved, and {has} are left"
        return
    wrong = goes_on(folder, left / "run", SCENARIOS[name][2])
    yield f"before call {at} of {name}, way {way}: {wrong}" if wrong else ""


def saved(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoints/step-*"))


def survive(work: Path, store: Path, left: Path, way: int, random: Random) -> None:
    """Into left, what a power cut leaves of work.

    way 0: nothing that was not flushed. 1: all names, but only the bytes that were flushed. 2: of
    each name and each file's bytes either what was flushed or what was there.
    """
    there = {path.lstat().st_ino: path for path in [work, *work.rglob("*")]}

    def names(inode: int) -> dict[str, int]:
        file, path = store / f"d{inode}", there.get(inode)
        pairs = (
            (line.split(" ", 1) for line in file.read_text().splitlines()) if file.exists() else ()
        )
        flushed = {name: int(number) for number, name in pairs}
        now = {x.name: x.lstat().st_ino for x in path.iterdir()} if path else flushed
        if way < 2:
            return [flushed, now][way]
        return {
            name: versions[name]
            for name in sorted(flushed.keys() | now.keys())
            if name in (versions := random.choice([flushed, now]))
        }

    def rebuild(inode: int, target: Path) -> None:
        path, kept = there.get(inode), store / f"c{inode}"
        if (store / f"d{inode}").exists() or (path and path.is_dir()):
            target.mkdir()
            for name, inner in names(inode).items():
                rebuild(inner, target / name)
        else:
            flushed = kept.read_bytes() if kept.exists() else b""
            now = path.read_bytes() if path else flushed
            target.write_bytes(random.choice([flushed, now]) if way == 2 else flushed)

    rebuild(work.stat().st_ino, left)


# ----------------------------------------------------------------------------- damage and company


def damaged(k: int, random: Random, folder: Path):
    """A file of a run that stopped: a bit of it, or its end."""
    out = shutil.copytree(WORLD["stopped"], folder / "run")
    file = random.choice(sorted(path for path in out.rglob("*") if path.is_file()))
    data = file.read_bytes()
    file.write_bytes(flip(data, random))
    ended = run(train, words(out, "--resume"), folder)
    where = file.relative_to(out)
    if ended.status == 0:
        yield "" if weights(out) == WORLD["end", 0] else f"{where}: other weights, and not a word"
    else:
        wrong = one_line(ended)
        yield f"{where}: {wrong}" if wrong else ""


def two_at_once(k: int, random: Random, folder: Path):
    """Two processes, one --out; the first may be killed. Then the folder goes on as it says."""
    out, places = folder / "run", [folder / "a", folder / "b"]
    seeds, flag = random.choice([(0, 0), (0, 1)]), random.choice(["--resume", "--overwrite"])
    pids = []
    for place, seed in zip(places, seeds, strict=True):
        place.mkdir()
        flags = ["--seed", seed, *[flag] * len(pids)]
        pids.append(start(train, words(out, *flags), place))
        time.sleep(random.uniform(0, WORLD["seconds"]))
    if random.random() < 0.5:
        kill(pids[0])
    for pid, place in zip(pids, places, strict=True):
        ended = end(pid, place)
        if ended.status not in (0, -9) and (wrong := one_line(ended)):
            yield wrong
            return
    begun = (out / "config.json").exists()  # else the first was killed before, the second refused
    ended = run(train, ["--resume", "--out", out] if begun else words(out), folder)
    seed = json.loads((out / "config.json").read_text())["arguments"]["seed"]
    same = weights(out) == WORLD["end", seed]
    yield "" if same and not ended.status else f"seed {seed}: {ended}"


RESUMES = "resumed, it ends with bitwise the weights of a run that nothing befell"
CAMPAIGNS = [
    Campaign("kills at random moments", RESUMES, killed_at_random, lambda: 220, 4),
    Campaign("kills before each file-system call", RESUMES, killed_before_a_call, calls, 4, True),
    Campaign(
        "failing and short writes at each call",
        f"it ends as ever, or with one line, and {RESUMES}",
        failing_call, lambda: 2 * WORLD["calls", "new"], 4, True,
    ),
    Campaign(
        "power cuts before each call",
        f"no more than the newest checkpoint is lost; {RESUMES}",
        power_cut, calls, 4, True,
    ),
    Campaign(
        "a flipped bit, a lost end of a run's file",
        "the same weights bitwise, or one line that names the file",
        damaged, lambda: 400, 8,
    ),
    Campaign(
        "two processes, one --out",
        "one is refused in one line; the folder ends with the weights of its config.json's seed",
        two_at_once, lambda: 60, 2,
    ),
]  # fmt: skip
