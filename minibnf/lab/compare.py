"""Many runs of the trainer from one base: methods x settings x seeds, into one JSON, a table and figures.

    python -m minibnf.lab.compare SPEC.json --out runs/compare
    python -m minibnf.lab.compare --tables results.json --figures DIR       # of what was measured before

The spec names a base, sets of data, methods with the settings to try, and which methods run on which set:

    {"base": DIR, "train": {flags of every run, such as "batch_size": 32}, "seeds": [1, 2, 3], "threads": 1,
     "sets": {"qa": {"kind": "qa", "count": 1024, "train": {"epochs": 6}}},
     "methods": {"dpo": {"loss": "dpo", "grid": {"lr": [1e-4, 3e-4], "beta": [0.1, 2]}, "customary": {"beta": 0.1}}},
     "on": {"qa": ["dpo"]}}

First every setting of a method's grid is run with seed 0 and examined on validation prompts. Then, with each of the seeds, its
best setting (by `objective` below) and its customary one (the best learning rate at the customary hyper-parameters), examined
on test prompts. Every finished run is a file of its own, so what was interrupted goes on where it stopped; --workers run at
once. A method with "extra" is no rival but answers a question of its own; "extra": "sweep" leaves out its second stage.

A set is of the small world (smallworld.py: "kind" qa or math, "count", "unpaired") or of files ("rows": a .jsonl of
preference rows, "count" of them to train on, "held_out" of them to examine, half validation and half test; "solutions": a
.jsonl of question and answer whose likelihood is measured): there a run is examined on both halves, and seeds may be [0].
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import islice, product
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from minibnf import train
from minibnf.data import read_examples
from minibnf.evaluate import tokenised
from minibnf.files.config import read_config
from minibnf.files.disk import read_json, write_json, write_text
from minibnf.files.rows import read_rows, scan_rows
from minibnf.files.tokenizer import load_tokenizer
from minibnf.lab import smallworld
from minibnf.lab.exam import Exam, HeldOut, exam, held_out, on_files, small_world, token_weights
from minibnf.losses import LOSSES
from minibnf.model import load
from minibnf.step import fingerprint

TRACE_POINTS = 32  # of a run's metrics that its result keeps
FEEDBACK_TOKENS = 100  # real tokens whose push is kept


# ------------------------------------------------------------------------------------------------------------- the plan


def settings(method: dict) -> list[dict]:
    """Every combination of the method's grid: [{"lr": 1e-4, "beta": 0.1}, ...]."""
    grid = method["grid"]
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def sweep(spec: dict) -> list[dict]:
    """The jobs of the first stage."""
    return [
        {"set": name, "method": method, "setting": setting, "seed": 0, "split": "validation"}
        for name, methods in spec["on"].items()
        for method in methods
        for setting in settings(spec["methods"][method])
    ]


def finals(spec: dict, runs: list[dict]) -> list[dict]:
    """The jobs of the second stage, out of the first one's results."""
    jobs = []
    for name, methods in spec["on"].items():
        for method in methods:
            if spec["methods"][method].get("extra") == "sweep":
                continue
            chosen = chosen_settings(spec, runs, name, method)
            distinct = {json.dumps(setting): setting for setting in chosen.values()}
            jobs += [
                {"set": name, "method": method, "setting": setting, "seed": seed, "split": "test"}
                for setting in distinct.values()
                for seed in spec["seeds"]
            ]
    return jobs


def chosen_settings(spec: dict, runs: list[dict], name: str, method: str) -> dict[str, dict]:
    """{"best": setting, "customary": setting} of a method on a set, by the validation runs."""
    tried = [
        r
        for r in runs
        if (r["set"], r["method"], r["split"], r["seed"]) == (name, method, "validation", 0)
    ]
    customary = spec["methods"][method].get("customary", {})
    usual = [r for r in tried if customary.items() <= r["setting"].items()]
    return {
        which: max(some, key=objective)["setting"]
        for which, some in (("best", tried), ("customary", usual))
    }


def objective(run: dict) -> float:
    """What settings are chosen by: a point of reasoning lost costs a point of win rate; for math reasoning itself counts.
    On files, the share of held-out pairs told right. A run that broke off is worse than all others."""
    found = {name: mean for name, (mean, _) in run["result"].items()}
    if not found:
        return -1.0
    if "preference" in found:
        return found["preference"]
    if run["kind"] == "math":
        return found["accuracy"]
    return found["win_rate"] - max(0.0, run["base"]["accuracy"][0] - found["accuracy"])


def collapsed(run: dict) -> bool:
    """The definition of collapse: the run met a number that is not finite, or the model lost half of the base's reasoning, or
    a quarter more of its answers than of the base's are degenerate (outside the grammar of answers)."""
    found, base = run["result"], run["base"]
    if not found:
        return True
    if "accuracy" not in found:
        return False  # of files nothing is generated, so nothing of the kind is measured
    return (
        found["accuracy"][0] < base["accuracy"][0] / 2
        or found["degenerate"][0] > base["degenerate"][0] + 0.25
    )


# ---------------------------------------------------------------------------------------------------------- one run


def prepare(spec: dict, name: str, folder: Path) -> dict[str, Path]:
    """The set's files, made where they are not there yet: "train", "validation" and "test"."""
    given, files = (
        spec["sets"][name],
        {split: folder / f"{name}-{split}.jsonl" for split in ("train", "validation", "test")},
    )
    if all(file.exists() for file in files.values()):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    if "rows" in given:
        rows = [row for _, row in read_rows(given["rows"])]
        count, held = given["count"], given["held_out"]
        if len(rows) < count + held:
            raise ValueError(
                f"{given['rows']} has {len(rows)} rows, fewer than the {count} and {held} that set '{name}' asks for"
            )
        if any("completion" in row for row in rows[count : count + held]):
            raise ValueError(
                f"{given['rows']}: the {held} rows that set '{name}' holds out must be pairs"
            )
        parts = (
            rows[:count],
            rows[count : count + held // 2],
            rows[count + held // 2 : count + held],
        )
        for file, part in zip(files.values(), parts, strict=True):
            write_text(file, "".join(json.dumps(row) + "\n" for row in part))
        return files
    model, tokenizer = load(spec["base"]), load_tokenizer(spec["base"])
    for split, count in (("train", given["count"]), ("validation", 256), ("test", 256)):
        rows = smallworld.pairs(
            given["kind"], smallworld.sampler(model, tokenizer), count, given.get("seed", 0), split
        )
        if split == "train" and given.get("unpaired"):
            rows = smallworld.unpaired(rows, given["unpaired"])
        write_text(files[split], "".join(json.dumps(row) + "\n" for row in rows))
    return files


def slug(job: dict) -> str:
    setting = "-".join(
        f"{k}{v:g}" if isinstance(v, float | int) else f"{k}_{v}" for k, v in job["setting"].items()
    )
    return f"{job['set']}-{job['method']}-{setting}-{job['split']}-{job['seed']}".replace(" ", "_")


def arguments(spec: dict, job: dict, files: dict, out: Path) -> list[str]:
    """The trainer's command line."""
    flags = spec.get("train", {}) | spec["sets"][job["set"]].get("train", {})
    flags |= {
        "lr": job["setting"]["lr"],
        "seed": job["seed"],
        "loss": spec["methods"][job["method"]]["loss"],
    }
    argv = [
        "--model",
        spec["base"],
        "--data",
        str(files["train"]),
        "--out",
        str(out),
        "--overwrite",
    ]
    argv += [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", f"{v}")]
    return argv + (["--loss-args", *hyper] if (hyper := loss_args(spec, job)) else [])


def loss_args(spec: dict, job: dict) -> list[str]:
    """["beta=0.1", ...], as the trainer takes them."""
    hyper = spec["methods"][job["method"]].get("fixed", {}) | {
        k: v for k, v in job["setting"].items() if k != "lr"
    }
    return [f"{k}={v}" for k, v in hyper.items()]


def run_job(spec: dict, job: dict, folder: Path) -> None:
    """Train and examine; the results are written to folder/results/: of a set of files on both halves of its held-out rows."""
    torch.set_num_threads(spec.get("threads", 1))
    files, out = prepare(spec, job["set"], folder / "data"), folder / "runs" / slug(job)
    out.mkdir(parents=True, exist_ok=True)
    began, text = time.perf_counter(), json.dumps(spec)
    with (
        open(out / "log.txt", "w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = train.main(arguments(spec, job, files, out))
    log = (out / "log.txt").read_text(encoding="utf-8").strip()
    if (
        code and "stopped at step" not in log
    ):  # where it did, the run met a number that is not finite: a result like others
        raise ValueError(f"{out}: the run failed: {log.splitlines()[-1]}")
    seconds = time.perf_counter() - began
    rows = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    kind = spec["sets"][job["set"]].get("kind", "files")
    for split in ("validation", "test") if kind == "files" else (job["split"],):
        one = job | {
            "split": split,
            "kind": kind,
            "steps": len(rows),
            "train_seconds": round(seconds, 1),
            "result": {},
        }
        one |= {"revision": revision()}
        asked, one["base"] = the_exam(text, job["set"], split, str(folder))
        if code == 0:
            one["result"] = examined(out / "model", asked)
            if split == "test" and job["seed"] == spec["seeds"][0]:
                one["trace"], one["feedback"] = (
                    trace(rows),
                    feedback_of(spec, job, files["test"], out / "model"),
                )
        write_json(folder / "results" / f"{slug(one)}.json", one)
    shutil.rmtree(out)


def rounded(x: float) -> float | None:
    return float(f"{x:.5g}") if x == x else None


def trace(rows: list[dict]) -> dict[str, list]:
    """The mean log-likelihoods of chosen and rejected against the step, at TRACE_POINTS steps or all there are."""
    names = [k for k in ("step", "logps/chosen", "logps/rejected") if any(k in row for row in rows)]
    rows = [
        row for row in rows if all(k in row for k in names)
    ]  # of unpaired rows a step may hold one kind alone
    count = min(TRACE_POINTS, len(rows))
    keep = [rows[i * (len(rows) - 1) // max(1, count - 1)] for i in range(count)]
    return {k: [rounded(row[k]) for row in keep] for k in names}


@cache
def the_exam(text: str, name: str, split: str, folder: str):
    """What models are asked, and what the base scores in it: once a process (text: the spec as JSON), for neither changes."""
    spec = json.loads(text)
    files, base, tokenizer = (
        prepare(spec, name, Path(folder) / "data"),
        load(spec["base"]),
        load_tokenizer(spec["base"]),
    )
    examples, _ = read_examples(files[split], tokenizer, base.config.max_position_embeddings)
    if "kind" in spec["sets"][name]:
        asked = exam(base, tokenizer, split=split, examples=examples, **spec.get("exam", {}))
        return asked, examined(spec["base"], asked)
    if extra := spec["sets"][name].get("solutions"):
        scanned = islice(scan_rows(extra["file"]), extra["count"])
        examples += tokenised(scanned, tokenizer, "likelihood")[1]
    asked = held_out(base, examples)
    return asked, examined(spec["base"], asked)


def examined(directory, asked: Exam | HeldOut) -> dict[str, list]:
    """{name: [mean, standard error]} of a model."""
    model, small = load(directory), isinstance(asked, Exam)
    found = (
        small_world(model, load_tokenizer(directory), asked) if small else on_files(model, asked)
    )
    return {k: [rounded(x) for x in pair] for k, pair in found.items()}


# ------------------------------------------------------------------------------------------------------------ all runs


def finished(folder: Path) -> dict[str, dict]:
    return {file.stem: read_json(file) for file in sorted((folder / "results").glob("*.json"))}


def run_all(spec: dict, jobs: list[dict], folder: Path, workers: int) -> list[dict]:
    """The results of the jobs, in their order; those that are there already are not run again."""
    done = finished(folder)
    todo = [job for job in jobs if slug(job) not in done]
    for name in {job["set"] for job in todo}:
        prepare(spec, name, folder / "data")
    bar = tqdm(
        total=len(jobs),
        initial=len(jobs) - len(todo),
        desc=jobs[0]["split"],
        unit="run",
        disable=None,
    )
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


def revision() -> str:
    """The git revision of this code, "+changes" where the package's files differ from it; "unknown" outside git."""
    here = Path(__file__).parent
    git = lambda *args: subprocess.run(
        ["git", *args], cwd=here, capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--", ".") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def compare(spec: dict, folder: Path, workers: int) -> dict:
    """Every run of the spec -> all that was measured, which is also written to folder/results.json."""
    check(spec)
    base = fingerprint(load(spec["base"]))
    for file, now in ((folder / "spec.json", spec), (folder / "base.json", {"sha256": base})):
        if file.exists() and read_json(file) != now:
            raise ValueError(
                f"{folder} holds runs of another {file.stem} ({file}); name another --out, or delete it"
            )
        (folder / "results").mkdir(parents=True, exist_ok=True)
        write_json(file, now)
    runs = run_all(spec, sweep(spec), folder, workers)
    runs += run_all(spec, finals(spec, runs), folder, workers)
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    facts = {"revision": sorted({r.pop("revision") for r in runs}), "base_sha256": base, **versions}
    facts["hours_of_training"] = round(sum(r["train_seconds"] for r in runs) / 3600, 2)
    facts["response_tokens"] = {name: response_tokens(spec, name, folder) for name in spec["on"]}
    results = {"spec": spec, "facts": facts, "runs": runs}
    write_text(folder / "results.json", dumps(results))
    return results


def feedback_of(spec: dict, job: dict, file: Path, model_directory: Path) -> dict[str, list]:
    """The weights of real tokens in the loss that trained the model; see exam.token_weights."""
    base, model, tokenizer = load(spec["base"]), load(model_directory), load_tokenizer(spec["base"])
    examples, _ = read_examples(file, tokenizer, base.config.max_position_embeddings)
    loss = LOSSES[spec["methods"][job["method"]]["loss"]]
    found = token_weights(
        base, model, examples[:16], loss, train.loss_hyper(loss, loss_args(spec, job))
    )
    keep = {side: [[rounded(x), rounded(w)] for x, w in pairs] for side, pairs in found.items()}
    return {side: pairs[:FEEDBACK_TOKENS] for side, pairs in keep.items()}


def response_tokens(spec: dict, name: str, folder: Path) -> float:
    """The mean length of the responses that a set is trained on."""
    file, tokenizer = prepare(spec, name, folder / "data")["train"], load_tokenizer(spec["base"])
    examples, _ = read_examples(
        file, tokenizer, read_config(spec["base"])[0].max_position_embeddings
    )
    return round(mean(len(response) for e in examples for response in e.responses), 1)


def dumps(results: dict) -> str:
    """JSON with one run a line."""
    runs = ",\n".join(json.dumps(run) for run in results["runs"])
    head = json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=1)
    return head[:-2] + ',\n "runs": [\n' + runs + "\n]}\n"


FIELDS = {  # of a spec, a method and a set: what each must have, and what it may have
    "spec": ({"base", "sets", "methods", "on", "seeds"}, {"train", "threads", "exam", "note"}),
    "method": ({"loss", "grid"}, {"fixed", "customary", "extra"}),
    "set of the small world": ({"kind", "count"}, {"unpaired", "train", "seed"}),
    "set of files": ({"rows", "count", "held_out"}, {"solutions", "train"}),
}


def check(spec: dict) -> None:
    """ValueError that names what in the spec is missing, unknown or refused by the trainer."""

    def fields(given: dict, what: str, name: str = ""):
        must, may = FIELDS[what]
        if missing := must - set(given):
            raise ValueError(f"{what}{name}: field '{min(missing)}' is missing")
        if unknown := set(given) - must - may:
            raise ValueError(f"{what}{name}: field '{min(unknown)}' is unknown")

    fields(spec, "spec")
    if not spec["seeds"]:
        raise ValueError("spec: 'seeds' is empty, and the second stage needs one")
    for name, given in spec["sets"].items():
        fields(given, "set of files" if "rows" in given else "set of the small world", f" '{name}'")
    for name, given in spec["methods"].items():
        fields(given, "method", f" '{name}'")
        if (
            given["loss"] not in LOSSES
            or "lr" not in given["grid"]
            or given.get("extra", True) not in (True, "sweep")
        ):
            raise ValueError(
                f"method '{name}' needs a 'loss' of {', '.join(LOSSES)} and an 'lr' in its 'grid'; extra: true, 'sweep'"
            )
        if not any(
            given.get("customary", {}).items() <= setting.items() for setting in settings(given)
        ):
            raise ValueError(
                f"method '{name}': its customary setting {given['customary']} is not in its grid"
            )
    for name, methods in spec["on"].items():
        for kind, wanted in (("sets", [name]), ("methods", methods)):
            if unknown := [x for x in wanted if x not in spec[kind]]:
                raise ValueError(f"spec: 'on' names '{unknown[0]}', which '{kind}' lacks")
    for job in sweep(spec):
        words = arguments(spec, job, {"train": "data"}, Path("out"))
        try:
            args = train.parse(words)
        except SystemExit:
            raise ValueError(
                f"set '{job['set']}', method '{job['method']}': the trainer refuses {' '.join(words)}"
            ) from None
        train.loss_hyper(LOSSES[args.loss], args.loss_args)


# ---------------------------------------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        "minibnf compare",
        description="Many runs from one base: a table and figures.",
        allow_abbrev=False,
    )
    p.add_argument(
        "spec",
        nargs="?",
        metavar="SPEC.json",
        help="what to run; see the top of minibnf/lab/compare.py",
    )
    p.add_argument(
        "--out", metavar="DIR", help="folder of the runs; what is finished there is not run again"
    )
    p.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="runs at once, each with the spec's threads; default 2",
    )
    p.add_argument("--tables", metavar="FILE", help="a results.json: print its tables, run nothing")
    p.add_argument(
        "--figures",
        metavar="DIR",
        help="where to draw the figures; default: OUT/figures, with --tables none",
    )
    args = p.parse_args(argv)
    if bool(args.tables) == bool(args.spec) or (args.spec and not args.out) or args.workers < 1:
        p.error("give SPEC.json and --out, or --tables FILE; --workers must be 1 or more")
    try:
        from minibnf.lab import figures as plots
        from minibnf.lab import verdicts

        spec = read_json(Path(args.tables or args.spec))
        results = spec if args.tables else compare(spec, Path(args.out), args.workers)
        if not {"spec", "facts", "runs"} <= set(results):
            raise ValueError(f"{args.tables} is no results.json of minibnf compare")
        text = verdicts.report(results)
        print(text)
        if args.out:
            write_text(Path(args.out) / "report.md", text + "\n")
        folder = args.figures or (Path(args.out) / "figures" if args.out else None)
        for file in plots.comparison(results, Path(folder)) if folder else ():
            print(f"figure  {file}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with what {args.out} holds", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
