"""Damage of every kind, and whether minibnf holds; a table at the end (make faults).

    python -m tests.faults [--short] [--only WORD] [--seed 0] [--workers 2]

Each trial is a function of the seed and its number. One that did not hold is printed with both:
--only WORD --number N runs it alone. Where there is no C compiler, campaigns that need file-system
calls to fail are skipped, and the table says so.
"""

import argparse
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

from tests.faults.trials import Campaign, compiled_shim, shim


def with_shim() -> None:
    """Start this process again with the shim, if there is a compiler."""
    if "FAULTS_SHIM" not in os.environ:
        library = compiled_shim()
        more = {"LD_PRELOAD": str(library)} if library else {}
        more |= {"FAULTS_SHIM": str(library), "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, sys.orig_argv, os.environ | more)


CAMPAIGNS: dict[str, Campaign] = {}  # by name, for the workers, which are forks


def tried(name: str, seed: int, k: int) -> tuple[int, list[str]]:
    """The trial of this number: (k, what it yields)."""
    campaign = CAMPAIGNS[name]
    folder = Path(tempfile.mkdtemp(prefix="minibnf-fault-"))
    try:
        found = list(campaign.trial(k, Random(f"{seed} {campaign.name} {k}"), folder))
    except Exception:
        found = [traceback.format_exc()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return k, found


def numbers(campaign: Campaign, args) -> list[int]:
    size = campaign.size()
    if args.number is not None:
        return [args.number]
    if args.short:
        return Random(f"{args.seed} {campaign.name}").sample(range(size), min(size, campaign.short))
    return list(range(size))


def conduct(campaign: Campaign, args) -> tuple[int, int]:
    """(tried, held) of a campaign, with progress; what did not hold is printed."""
    began, counts, todo = time.perf_counter(), Counter(), numbers(campaign, args)
    trial = partial(tried, campaign.name, args.seed)
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:
        for done, (k, found) in enumerate(pool.imap_unordered(trial, todo), 1):
            for why in found:
                counts["tried"] += 1
                counts["held"] += not why
                if why and counts["tried"] - counts["held"] <= args.shown:
                    print(f"\n  number {k} did not hold: {why}", flush=True)
            share, seconds = done / len(todo), time.perf_counter() - began
            line = f"{campaign.name}: {counts['tried']:,} tried, {counts['held']:,} held"
            if sys.stdout.isatty() or done % (len(todo) // 4 + 1) == 0 or done == len(todo):
                end = "" if sys.stdout.isatty() and done < len(todo) else "\n"
                print(f"\r{line}, {share:.0%}, {seconds:.0f} s", end=end, flush=True)
    return counts["tried"], counts["held"]


def main() -> int:
    p = argparse.ArgumentParser("python -m tests.faults")
    p.add_argument("--short", action="store_true", help="a few trials of each, under a minute")
    p.add_argument("--only", default="", metavar="WORD", help="campaigns whose name has the word")
    p.add_argument("--number", type=int, metavar="N", help="this trial alone")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--shown", type=int, default=5, help="how many that did not hold are printed")
    args = p.parse_args()
    with_shim()
    from tests.faults import (
        damage,
        inputs,
        numbers,
        runs,
    )  # after the shim, since they take seconds

    if os.access("/dev/shm", os.W_OK):  # what is flushed there costs no time
        tempfile.tempdir = "/dev/shm"
    began, table = time.perf_counter(), []
    folder = Path(tempfile.mkdtemp(prefix="minibnf-faults-"))
    try:
        modules = runs, damage, inputs, numbers
        for module in modules:
            module.make_world(folder)
        every = [c for module in modules for c in module.CAMPAIGNS]
        CAMPAIGNS.update({c.name: c for c in every if args.only in c.name})
        for campaign in CAMPAIGNS.values():
            if campaign.needs_shim and shim() is None:
                table.append((campaign, "skipped", "no C compiler"))
            else:
                table.append((campaign, *conduct(campaign, args)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    minutes = (time.perf_counter() - began) / 60
    print("\n| campaign | tried | held | it held if |\n|---|---:|---:|---|")
    for campaign, n, held in table:
        cells = [f"{x:,}" if isinstance(x, int) else x for x in (n, held)]
        print(f"| {campaign.name} | {' | '.join(cells)} | {campaign.judged} |")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"\nSeed {args.seed}, {minutes:.1f} minutes; {machine}.")
    return int(any(n != held and n != "skipped" for _, n, held in table))


if __name__ == "__main__":
    sys.exit(main())
