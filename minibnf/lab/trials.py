"""One run of a comparison: its files, its training, its examination; and many of them at once.

compare.py says what a spec holds, plan.py what a job is. Every finished run is a file of its own in
FOLDER/results; its model is deleted.
"""

import contextlib
import json
import multiprocessing
import shutil
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from minibnf import train
from minibnf.arguments import loss_hyper
from minibnf.data import read_examples
from minibnf.evaluate import tokenised
from minibnf.files.config import read_config
from minibnf.files.disk import read_json, write_json
from minibnf.files.rows import read_rows, scan_rows
from minibnf.files.tokenizer import load_tokenizer
from minibnf.lab.exam import Exam, HeldOut, exam, held_out, on_files, small_world, token_weights
from minibnf.lab.smallworld import pairs, sampler, unpaired, write_rows
from minibnf.losses import LOSSES
from minibnf.model import load

TRACE_POINTS = 32  # of a run's metrics that its result keeps
FEEDBACK_TOKENS = 100  # real tokens whose push is kept

# ---- A set's files ----


def prepare(spec: dict, name: str, folder: Path) -> dict[str, Path]:
    """The set's files, made where they are not there yet: "train", "validation" and "test"."""
    files = {split: folder / f"{name}-{split}.jsonl" for split in ("train", "validation", "test")}
    if all(file.exists() for file in files.values()):
        return files
    given = spec["sets"][name]
    of_file = "rows" in given
    parts = parts_of_a_file(name, given) if of_file else drawn_parts(spec["base"], given)
    for file, rows in zip(files.values(), parts, strict=True):
        write_rows(file, rows)
    return files


def parts_of_a_file(name: str, given: dict) -> list[list[dict]]:
    """The rows to train on, then the two halves of those held out."""
    rows = [row for _, row in read_rows(given["rows"])]
    count, held = given["count"], given["held_out"]
    if len(rows) < count + held:
        raise ValueError(
            f"{given['rows']} has {len(rows)} rows, "
            f"fewer than the {count} and {held} that set '{name}' asks for"
        )
    if any("completion" in row for row in rows[count : count + held]):
        raise ValueError(
            f"{given['rows']}: the {held} rows that set '{name}' holds out must be pairs"
        )
    middle = count + held // 2
    return [rows[:count], rows[count:middle], rows[middle : count + held]]


def drawn_parts(base: str, given: dict) -> list[list[dict]]:
    """Small-world rows to train on, then 256 pairs each for validation and test."""
    sample, seed = sampler(load(base), load_tokenizer(base)), given.get("seed", 0)
    rows = pairs(given["kind"], sample, given["count"], seed, "train")
    if given.get("unpaired"):
        rows = unpaired(rows, given["unpaired"])
    held = [pairs(given["kind"], sample, 256, seed, split) for split in ("validation", "test")]
    return [rows, *held]


# ---- One run ----


def slug(job: dict) -> str:
    """A job's name, which its files have."""
    setting = "-".join(
        f"{k}{v:g}" if isinstance(v, float | int) else f"{k}_{v}" for k, v in job["setting"].items()
    )
    return f"{job['set']}-{job['method']}-{setting}-{job['split']}-{job['seed']}".replace(" ", "_")


def arguments(spec: dict, job: dict, files: dict, out: Path) -> list[str]:
    """The trainer's command line."""
    paths = {"model": spec["base"], "data": files["train"], "out": out}
    flags = spec.get("train", {}) | spec["sets"][job["set"]].get("train", {})
    flags |= {"lr": job["setting"]["lr"], "seed": job["seed"]}
    flags |= {"loss": spec["methods"][job["method"]]["loss"]}
    hyper = loss_args(spec, job)
    more = ["--loss-args", *hyper] if hyper else []
    return [*words(paths), "--overwrite", *words(flags), *more]


def words(flags: dict) -> list[str]:
    """{"batch_size": 8} -> ["--batch-size", "8"]."""
    return [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", f"{v}")]


def loss_args(spec: dict, job: dict) -> list[str]:
    """["beta=0.1", ...], as the trainer takes them."""
    hyper = spec["methods"][job["method"]].get("fixed", {}) | job["setting"]
    return [f"{k}={v}" for k, v in hyper.items() if k != "lr"]


def trained(argv: list[str], out: Path) -> bool:
    """Run the trainer. False where it met a number that is not finite: a result like others."""
    out.mkdir(parents=True, exist_ok=True)
    with (
        open(out / "log.txt", "w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = train.main(argv)
    said = (out / "log.txt").read_text(encoding="utf-8").strip()
    if code and "stopped at step" not in said:
        raise ValueError(f"{out}: the run failed: {said.splitlines()[-1]}")
    return code == 0


def run_job(spec: dict, job: dict, folder: Path) -> None:
    """Train and examine; the results are written to folder/results.

    A run on files has two results, one for each half of the held-out rows.
    """
    torch.set_num_threads(spec.get("threads", 1))
    files, out = prepare(spec, job["set"], folder / "data"), folder / "runs" / slug(job)
    began, text = time.perf_counter(), json.dumps(spec)
    whole = trained(arguments(spec, job, files, out), out)
    seconds = round(time.perf_counter() - began, 1)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    kind = spec["sets"][job["set"]].get("kind", "files")
    for split in ("validation", "test") if kind == "files" else [job["split"]]:
        run = job | {"split": split, "kind": kind, "steps": len(rows), "train_seconds": seconds}
        run |= {"result": {}, "revision": revision()}
        asked, run["base"] = the_exam(text, job["set"], split, str(folder))
        if whole:
            run["result"] = examined(out / "model", asked)
            if split == "test" and job["seed"] == spec["seeds"][0]:
                run["trace"] = trace(rows)
                run["feedback"] = feedback_of(spec, job, files["test"], out / "model")
        write_json(folder / "results" / f"{slug(run)}.json", run)
    shutil.rmtree(out)


def rounded(x: float) -> float | None:
    return float(f"{x:.5g}") if x == x else None


def trace(rows: list[dict]) -> dict[str, list]:
    """The mean log-likelihoods of chosen and rejected at TRACE_POINTS steps, or all there are.

    Of unpaired rows a step may hold one kind alone; such steps are left out.
    """
    names = [k for k in ("step", "logps/chosen", "logps/rejected") if any(k in row for row in rows)]
    rows = [row for row in rows if all(k in row for k in names)]
    count = min(TRACE_POINTS, len(rows))
    keep = [rows[i * (len(rows) - 1) // max(1, count - 1)] for i in range(count)]
    return {k: [rounded(row[k]) for row in keep] for k in names}


def feedback_of(spec: dict, job: dict, file: Path, model_directory: Path) -> dict[str, list]:
    """The weights of real tokens in the loss that trained the model; see exam.token_weights."""
    base, model, tokenizer = load(spec["base"]), load(model_directory), load_tokenizer(spec["base"])
    examples, _ = read_examples(file, tokenizer, base.config.max_position_embeddings)
    loss = LOSSES[spec["methods"][job["method"]]["loss"]]
    hyper = loss_hyper(loss, loss_args(spec, job))
    found = token_weights(base, model, examples[:16], loss, hyper)
    return {
        side: [[rounded(x), rounded(w)] for x, w in points[:FEEDBACK_TOKENS]]
        for side, points in found.items()
    }


@cache
def the_exam(text: str, name: str, split: str, folder: str) -> tuple[Exam | HeldOut, dict]:
    """What models are asked, and what the base scores in it, made once per process.

    text is the spec as JSON: what is cached must be hashable.
    """
    spec = json.loads(text)
    file = prepare(spec, name, Path(folder) / "data")[split]
    base, tokenizer = load(spec["base"]), load_tokenizer(spec["base"])
    examples, _ = read_examples(file, tokenizer, base.config.max_position_embeddings)
    if "kind" in spec["sets"][name]:
        asked = exam(base, tokenizer, split=split, examples=examples, **spec.get("exam", {}))
        return asked, examined(spec["base"], asked)
    if solutions := spec["sets"][name].get("solutions"):
        scanned = islice(scan_rows(solutions["file"]), solutions["count"])
        examples += tokenised(scanned, tokenizer, "likelihood")[1]
    asked = held_out(base, examples)
    return asked, examined(spec["base"], asked)


def examined(directory, asked: Exam | HeldOut) -> dict[str, list]:
    """{name: [mean, standard error]} of a model."""
    model = load(directory)
    if isinstance(asked, Exam):
        found = small_world(model, load_tokenizer(directory), asked)
    else:
        found = on_files(model, asked)
    return {k: [rounded(x) for x in pair] for k, pair in found.items()}


def revision() -> str:
    """The git revision of this code; "unknown" outside git.

    "+changes" follows where the package's files differ from it.
    """

    def git(*words: str) -> str:
        here = Path(__file__).parents[1]
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- All runs ----


def finished(folder: Path) -> dict[str, dict]:
    return {file.stem: read_json(file) for file in sorted((folder / "results").glob("*.json"))}


def run_all(spec: dict, jobs: list[dict], folder: Path, workers: int) -> list[dict]:
    """The results of the jobs, in their order; those that are there already are not run again."""
    done = finished(folder)
    todo = [job for job in jobs if slug(job) not in done]
    for name in {job["set"] for job in todo}:
        prepare(spec, name, folder / "data")
    ready, stage = len(jobs) - len(todo), jobs[0]["split"]
    bar = tqdm(total=len(jobs), initial=ready, desc=stage, unit="run", disable=None)
    with bar, ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        going = [pool.submit(run_job, spec, job, folder) for job in todo]
        try:
            for future in as_completed(going):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    done = finished(folder)
    return [done[slug(job)] for job in jobs]


def response_tokens(spec: dict, name: str, folder: Path) -> float:
    """The mean length of the responses that a set is trained on."""
    file, tokenizer = prepare(spec, name, folder / "data")["train"], load_tokenizer(spec["base"])
    context = read_config(spec["base"])[0].max_position_embeddings
    examples, _ = read_examples(file, tokenizer, context)
    return round(mean(len(response) for e in examples for response in e.responses), 1)
