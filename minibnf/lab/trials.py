"""One run of a comparison: its files, its training, its examination; and many of them at once.

compare.py says what a spec holds, plan.py what a job is. Every finished run is a file of its own in
FOLDER/results; its model is deleted.
"""

import contextlib
import multiprocessing
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from minibnf import train
from minibnf.data import Example, read_examples
from minibnf.evaluate import tokenised
from minibnf.files.config import read_config
from minibnf.files.disk import read_json, write_json
from minibnf.files.rows import read_rows, scan_rows
from minibnf.files.terminal import as_words
from minibnf.files.tokenizer import load_tokenizer
from minibnf.lab.exam import Exam, figures_of, held_out, on_files
from minibnf.lab.smallworld import pairs, sampler, unpaired, write_rows
from minibnf.model import Transformer, load

# ---- A set's files ----


def prepare(spec: dict, name: str, folder: Path) -> dict[str, Path]:
    """The set's files, made where they are not there yet: "train", "validation" and "test"."""
    files = {split: folder / f"{name}-{split}.jsonl" for split in ("train", "validation", "test")}
    if all(file.exists() for file in files.values()):
        return files
    given = spec["sets"][name]
    parts = parts_of_a_file(given) if "rows" in given else drawn_parts(spec["base"], given)
    for file, rows in zip(files.values(), parts, strict=True):
        write_rows(file, rows)
    return files


def parts_of_a_file(given: dict) -> list[list[dict]]:
    """The rows to train on, then the two halves of the pairs held out."""
    rows = [row for _, row in read_rows(given["rows"])]
    count, held = given["count"], given["held_out"]
    tested = rows[count : count + held]
    if len(tested) < held or any("completion" in row for row in tested):
        raise ValueError(
            f"{given['rows']} must have {count} rows to train on and then {held} pairs to hold out"
        )
    return [rows[:count], tested[: held // 2], tested[held // 2 :]]


def drawn_parts(base: str, given: dict) -> list[list[dict]]:
    """Small-world rows to train on, then 256 pairs each for validation and test."""
    kind, seed = given["kind"], given.get("seed", 0)
    sample = sampler(load(base), load_tokenizer(base), kind)
    rows = pairs(kind, sample, given["count"], seed, "train")
    if given.get("unpaired"):
        rows = unpaired(rows, given["unpaired"])
    held = [pairs(kind, sample, 256, seed, split) for split in ("validation", "test")]
    return [rows, *held]


# ---- One run ----


def slug(job: dict) -> str:
    """A job's name, which its files have."""
    setting = "-".join(f"{name}{value}" for name, value in job["setting"].items())
    name = f"{job['set']}-{job['method']}-{setting}-{job['split']}-{job['seed']}"
    return name.replace(" ", "_").replace("/", "+").replace("|", "")  # "bnf/topr" is no folder


def arguments(spec: dict, job: dict, data, out) -> list[str]:
    """The trainer's command line."""
    method, given = spec["methods"][job["method"]], spec["sets"][job["set"]]
    flags = {"model": spec["base"], "data": data, "out": out}
    flags |= spec.get("train", {}) | given.get("train", {})
    flags |= {"loss": method["loss"], "lr": job["setting"]["lr"], "seed": job["seed"]}
    hyper = method.get("fixed", {}) | job["setting"]
    if (product := hyper.pop("beta|y|", None)) is not None:
        if "tokens" not in given:
            raise ValueError(f"set '{job['set']}': 'beta|y|' needs its 'tokens'")
        hyper["beta"] = product / given["tokens"]
    hyper = [f"{k}={v}" for k, v in hyper.items() if k != "lr"]
    return as_words(flags | {"overwrite": True, "loss_args": hyper})


def trained(argv: list[str], out: Path) -> bool:
    """Run the trainer. False where it met a number that is not finite: a result like others."""
    out.mkdir(parents=True, exist_ok=True)
    with (
        open(out / "log.txt", "w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = train.main(argv)
    if code == 130:
        raise KeyboardInterrupt
    said = (out / "log.txt").read_text(encoding="utf-8").strip()
    if code and "stopped at step" not in said:
        raise ValueError(f"{out}: the run failed: {said.splitlines()[-1]}")
    return code == 0


def run_job(folder: Path, job: dict) -> None:
    """Train and examine; the results are written to folder/results.

    A run of the first stage on files has two results, one for each half of the held-out rows, so
    that the second stage need not train it again. "each" holds what was measured of each prompt,
    which the bootstrap of frontiers.py draws from.
    """
    spec = read_json(folder / "spec.json")
    torch.set_num_threads(spec.get("threads", 1))
    files, out = prepare(spec, job["set"], folder / "data"), folder / "runs" / slug(job)
    began = time.perf_counter()
    whole = trained(arguments(spec, job, files["train"], out), out)
    seconds = round(time.perf_counter() - began, 1)
    steps = len((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    kind = spec["sets"][job["set"]].get("kind", "files")
    both = kind == "files" and job["split"] == "validation"
    for split in ("validation", "test") if both else [job["split"]]:
        run = job | {"split": split, "kind": kind, "steps": steps, "train_seconds": seconds}
        run |= {"result": {}, "each": {}, "revision": revision()}
        examine, (run["base"], _) = examination(folder, job["set"], split)
        if whole:
            run["result"], run["each"] = examine(load(out / "model"))
        write_json(folder / "results" / f"{slug(run)}.json", run)
    shutil.rmtree(out)


def each_of_base(folder: Path, name: str) -> dict[str, dict]:
    """{"test": what was measured of each prompt with the base}."""
    return {"test": examination(folder, name, "test")[1][1]}


EACH = ("win_rate", "accuracy", "preference", "solutions")


def rounded(numbers: Iterable) -> list[float | int | None]:
    """To five digits, whole ones as integers (JSON is shorter so), nan as None."""
    found = [float(f"{x:.5g}") for x in numbers]
    return [None if x != x else int(x) if x.is_integer() else x for x in found]


def examples_of(spec: dict, file: Path) -> list[Example]:
    context = read_config(spec["base"])[0].max_position_embeddings
    return read_examples(file, load_tokenizer(spec["base"]), context)[0]


@cache
def examination(folder: Path, name: str, split: str) -> tuple[Callable, tuple[dict, dict]]:
    """A function from a model to its {name: [mean, standard error]} and {name: one number per
    prompt}, and the base's two; made once."""
    spec = read_json(folder / "spec.json")
    given, base, tokenizer = spec["sets"][name], load(spec["base"]), load_tokenizer(spec["base"])
    examples, solutions = examples_of(spec, prepare(spec, name, folder / "data")[split]), []
    if "kind" in given:
        how = {"kind": given["kind"], "split": split} | spec.get("exam", {})
        measure = Exam(base, tokenizer, examples, **how).measure
    else:
        if asked := given.get("solutions"):
            scanned = islice(scan_rows(asked["file"]), asked["count"])
            solutions = tokenised(scanned, tokenizer, "likelihood")
        held = held_out(base, examples)
        measure = partial(on_files, examples=examples, base=held, solutions=solutions)

    def examine(model: Transformer) -> tuple[dict, dict]:
        """Rounded; null stands for nan."""
        measured = measure(model)
        each = {name: rounded(measured[name]) for name in EACH if name in measured}
        return {name: rounded(pair) for name, pair in figures_of(measured).items()}, each

    return examine, examine(base)


def revision() -> str:
    """The git revision of this code, "+changes" where tracked files differ; "unknown" elsewhere."""
    words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # there is no git
        return "unknown"
    return done.stdout.strip() or "unknown"


# ---- All runs ----


def run_all(spec: dict, jobs: list[dict], folder: Path, workers: int) -> list[dict]:
    """The results of the jobs, in their order; those that are there already are not run again."""
    if not jobs:
        return []
    files = [folder / "results" / f"{slug(job)}.json" for job in jobs]
    todo = [job for job, file in zip(jobs, files, strict=True) if not file.exists()]
    for name in {job["set"] for job in todo}:
        prepare(spec, name, folder / "data")
    ready, stage = len(jobs) - len(todo), jobs[0]["split"]
    bar = tqdm(total=len(jobs), initial=ready, desc=stage, unit="run", disable=None)
    with bar, ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        left, running = iter(todo), set()
        while True:  # no job waits in the pool: after an error or Ctrl-C it would still begin
            more = islice(left, workers - len(running))
            running |= {pool.submit(run_job, folder, job) for job in more}
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for one in done:
                one.result()
                bar.update()
    return [read_json(file) for file in files]


def response_tokens(spec: dict, name: str, folder: Path) -> float:
    """The mean length of the responses that a set is trained on."""
    examples = examples_of(spec, prepare(spec, name, folder / "data")["train"])
    return round(mean(len(response) for e in examples for response in e.responses), 1)
