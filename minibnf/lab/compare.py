"""Many runs of the trainer from one base: methods x settings x seeds, into a JSON, tables, figures.

    python -m minibnf.lab.compare SPEC.json --out runs/compare
    python -m minibnf.lab.compare --tables results.json --figures DIR    # of what was measured

The spec names a base, sets of data, methods with the settings to try, and which methods run on
which set:

    {"base": DIR, "train": {flags of every run, such as "batch_size": 32},
     "seeds": [1, 2, 3], "threads": 1,
     "sets": {"qa": {"kind": "qa", "count": 1024, "train": {"epochs": 6}}},
     "methods": {"dpo": {"loss": "dpo", "grid": {"lr": [1e-4, 3e-4], "beta": [0.1, 2]},
                         "customary": {"beta": 0.1}}},
     "on": {"qa": ["dpo"]}}

A grid may also be a list of settings. "beta|y|" stands for β times the mean length of a response:
the set says how many "tokens" that is. On a set with "test_lr" nothing is chosen: the customary
settings are tested at these rates; where it has "lr" too, these are run on validation prompts.

First every setting is run with seed 0 and examined on validation prompts. Then some are run with
each of the seeds and examined on test prompts: on a set with "test_lr" those at these rates, else
the best, the customary and those of the frontier (plan.final_settings). Every finished run is a
file of its own, so an interrupted comparison goes on where it stopped. --workers run at once. A
method with "extra" is no rival but answers a question of its own; "extra": "sweep" leaves out its
second stage.

A set is of the small world (a "kind" of smallworld.py, "count", "unpaired") or of files: "rows" is
a .jsonl of preference rows, "count" of them to train on, "held_out" of them to examine, half
validation and half test; "solutions" is a .jsonl of question and answer whose likelihood is
measured. On files a run of the first stage is examined on both halves. Such a set may have "seeds"
of its own, [0] for what the first stage has measured already.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch

from minibnf import arguments
from minibnf.files.disk import read_json, write_json, write_text
from minibnf.files.safetensors import fingerprint
from minibnf.files.terminal import ArgumentParser, in_one_line, positive, show
from minibnf.lab import trials
from minibnf.lab.plan import combinations, customary, finals, sweep
from minibnf.lab.smallworld import KINDS
from minibnf.lab.verdicts import report
from minibnf.losses import LOSSES
from minibnf.model import load

# ---- The spec ----

FIELDS = {  # of a spec, a method and a set: what each must have, and what it may have
    "spec": ({"base", "sets", "methods", "on", "seeds"}, {"train", "threads", "exam", "note"}),
    "method": ({"loss"}, {"grid", "fixed", "customary", "extra"}),
    "set of the small world": (
        {"kind", "count"},
        {"unpaired", "train", "seed", "tokens", "lr", "test_lr"},
    ),
    "set of files": ({"rows", "count", "held_out"}, {"solutions", "train", "tokens", "seeds"}),
}


def check_names(given: dict, what: str, name: str = "") -> None:
    must, may = FIELDS[what]
    if wrong := (must ^ set(given)) - may:
        how = "missing" if min(wrong) in must else "unknown"
        raise ValueError(f"{what}{name}: field '{min(wrong)}' is {how}")


def check(spec: dict) -> None:
    """ValueError that names what in the spec is missing, unknown or refused by the trainer."""
    check_names(spec, "spec")
    for name, given in spec["sets"].items():
        what = "set of files" if "rows" in given else "set of the small world"
        check_names(given, what, f" '{name}'")
        if given.get("kind", "qa") not in KINDS:
            raise ValueError(f"set '{name}': its 'kind' must be one of {', '.join(KINDS)}")
    for name, given in spec["methods"].items():
        check_names(given, "method", f" '{name}'")
        usual, tried = customary(spec, name), combinations(given) if "grid" in given else []
        if tried and not any("lr" in x and usual.items() <= x.items() for x in tried):
            raise ValueError(
                f"method '{name}': its grid must hold an 'lr', and the customary {usual}"
            )
    for name, methods in spec["on"].items():
        if unknown := {name, *methods} - {*spec["sets"], *spec["methods"]}:
            raise ValueError(f"spec: 'on' names '{min(unknown)}', no set or method of it")
        given = spec["sets"][name]
        if "lr" in given and not set(given.get("test_lr", [])) <= set(given["lr"]):
            raise ValueError(f"set '{name}': its 'test_lr' must be among its 'lr'")
        rates = {"lr", "test_lr"} & set(given)
        if lacking := [m for m in methods if not rates and "grid" not in spec["methods"][m]]:
            raise ValueError(f"method '{lacking[0]}': field 'grid' is missing")
    for job in sweep(spec) or finals(spec, []):
        words = trials.arguments(spec, job, "data", "out")
        try:
            args = arguments.parse(words)
        except SystemExit:
            where = f"set '{job['set']}', method '{job['method']}'"
            raise ValueError(f"{where}: the trainer refuses {' '.join(words)}") from None
        arguments.loss_hyper(LOSSES[args.loss], args.loss_args)


# ---- The comparison ----


def compare(spec: dict, folder: Path, workers: int, known: dict | None = None) -> dict:
    """Every run of the spec -> all that was measured, also written to folder/results.json.

    What `known`, results of another comparison, holds of this one is taken from it.
    """
    check(spec)
    base = fingerprint(load(spec["base"]).named_parameters())
    for stem, now in {"spec": spec, "base": {"sha256": base}}.items():
        file = folder / f"{stem}.json"
        if file.exists() and read_json(file) != now:
            raise ValueError(
                f"{folder} holds runs of another {stem} ({file}); name another --out, or delete it"
            )
        (folder / "results").mkdir(parents=True, exist_ok=True)
        write_json(file, now)
    if known:
        take(known, spec, base, folder)
    runs = trials.run_all(spec, sweep(spec), folder, workers)
    runs += trials.run_all(spec, finals(spec, runs), folder, workers)
    facts = {
        "revision": sorted({r["revision"] for r in runs}),
        "base_sha256": base,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "hours_of_training": round(sum(r["train_seconds"] for r in runs) / 3600, 2),
        "response_tokens": {x: trials.response_tokens(spec, x, folder) for x in spec["on"]},
        "base": {x: trials.each_of_base(folder, x) for x in spec["on"]},
    }
    results = {"spec": spec, "facts": facts, "runs": runs}
    write_text(folder / "results.json", dumps(results))
    return results


DATA = ("kind", "count", "unpaired", "seed", "tokens", "train", "rows", "held_out", "solutions")


def take(known: dict, spec: dict, base: str, folder: Path) -> None:
    """Write the runs of `known` whose base, data, flags and loss are this spec's to the folder."""
    theirs = known["spec"]
    same = all(theirs.get(field) == spec.get(field) for field in ("train", "exam"))
    if known["facts"]["base_sha256"] != base or not same:
        return
    for run in known["runs"]:
        name, method = run["set"], run["method"]
        sets = theirs["sets"][name], spec["sets"].get(name, {})
        same_set = len({json.dumps([s.get(field) for field in DATA]) for s in sets}) == 1
        one, other = (x["methods"].get(method, {}) for x in (theirs, spec))
        same_loss = all(one.get(field) == other.get(field) for field in ("loss", "fixed"))
        if same_set and same_loss and "each" in run:
            write_json(folder / "results" / f"{trials.slug(run)}.json", run)


def dumps(results: dict) -> str:
    """JSON with one run per line."""
    runs = ",\n".join(json.dumps(run) for run in results["runs"])
    head = json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=1)
    return head[:-2] + ',\n "runs": [\n' + runs + "\n]}\n"


# ---- The command ----


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = ArgumentParser("minibnf compare", allow_abbrev=False)
    p.description = "Many runs from one base: a table and figures."
    a = p.add_argument
    # fmt: off
    a("spec", nargs="?", metavar="SPEC.json",
      help="what to run; see the top of minibnf/lab/compare.py")
    a("--out", metavar="DIR", help="folder of the runs; what is finished there is not run again")
    a("--workers", type=positive, default=2, metavar="N",
      help="runs at once, each with the spec's threads; default 2")
    a("--known", metavar="FILE",
      help="a results.json: what it holds of this comparison is not run again")
    a("--tables", metavar="FILE", help="a results.json: print its tables, run nothing")
    a("--figures", metavar="DIR",
      help="where to draw the figures; default: OUT/figures, with --tables none")
    # fmt: on
    args = p.parse_args(argv)
    if bool(args.tables) == bool(args.spec) or (args.spec and not args.out):
        p.error("give SPEC.json and --out, or --tables FILE")
    return args


@in_one_line
def main(argv: list[str] | None = None) -> None:
    """Run what is asked for, or read what was measured; print the report, draw the figures."""
    args = parse(argv)
    from minibnf.lab import figures  # needs matplotlib; known before hours of runs

    given = read_json(Path(args.tables or args.spec))
    try:
        known = args.known and read_json(Path(args.known))
        results = given if args.tables else compare(given, Path(args.out), args.workers, known)
    except KeyboardInterrupt:
        said = f"the same command goes on with what {args.out} holds"
        raise KeyboardInterrupt(said) from None
    if not {"spec", "facts", "runs"} <= set(results):
        raise ValueError(f"{args.tables} is no results.json of minibnf compare")
    text = report(results)
    show(text)
    folder = args.figures
    if args.out:
        write_text(Path(args.out) / "report.md", text + "\n")
        folder = folder or Path(args.out) / "figures"
    if folder:
        for file in figures.comparison(results, Path(folder)):
            show(f"figure  {file}")


if __name__ == "__main__":
    sys.exit(main())
