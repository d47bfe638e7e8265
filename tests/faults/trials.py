"""What every campaign needs: a child process to do the damage in, and how its end is judged."""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import RLock
from typing import NamedTuple

from tqdm import tqdm

HERE = Path(__file__).parent
tqdm.set_lock(RLock())  # forks share its own lock, and one that is killed never lets go of it
NONE, KILL, ONCE, FULL, HALF_THEN_FULL, HALF = range(6)  # the modes of shim.c
BUG = 99  # the status of a child that ended with a traceback


@dataclass(frozen=True)
class Campaign:
    """A kind of damage.

    trial(k, random, folder) does what number k stands for in an empty folder, and yields for each
    try "" where it held, else what happened. sizes: how many k there are. short: how many of them
    the test suite draws. needs_shim: whether file-system calls must be made to fail.
    """

    name: str
    judged: str
    trial: Callable[[int, Random, Path], Iterator[str]]
    size: Callable[[], int]
    short: int
    needs_shim: bool = False


# ------------------------------------------------------------------------------------- the shim


def compiled_shim() -> Path | None:
    """The library of shim.c; None where there is no C compiler, or no Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    target = Path(tempfile.mkdtemp(prefix="minibnf-shim-"), "shim.so")
    command = [compiler, "-O1", "-shared", "-fPIC", str(HERE / "shim.c"), "-o", str(target), "-ldl"]
    return target if subprocess.run(command).returncode == 0 else None


def shim():
    """The shim, where this process was started with it."""
    return ctypes.CDLL(None) if "minibnf-shim" in os.environ.get("LD_PRELOAD", "") else None


# ------------------------------------------------------------------------------------- children


class Ended(NamedTuple):
    status: int  # an exit status, or minus the signal that ended it
    out: str
    err: str
    calls: int = 0  # counted by the shim

    def __str__(self):
        said = (self.err or self.out).strip().replace("\n", " | ")
        return f"status {self.status}: {said[-600:]}"


def start(main, words, folder: Path, *, fault=(), memory=2 * 10**9, seconds=60) -> int:
    """Start main(words) in a child; returns its process. end() waits for it.

    folder: where it says what it says. fault: what fault_arm of the shim is given. memory, seconds:
    what it may take, in bytes of addresses beyond what this process has, and of processor time.
    """
    if pid := os.fork():
        return pid
    status = BUG
    try:
        for fd, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="utf-8") for fd in (1, 2))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory,) * 2)
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + seconds,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if fault:
            below, mode, at, store = fault
            shim().fault_arm(os.fsencode(below), mode, ctypes.c_long(at), os.fsencode(store))
        status = status_of(main, words)
    except BaseException:
        traceback.print_exc()
    finally:
        calls = shim().fault_calls() if fault else 0
        if fault:
            shim().fault_arm(b"", NONE, ctypes.c_long(0), b"")
        (folder / "calls").write_text(str(calls))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status_of(main, words) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return BUG


def end(pid: int, folder: Path) -> Ended:
    """What became of the child; it may have been killed before it said anything."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err, calls = (
        (folder / name).read_text(errors="replace") if (folder / name).exists() else ""
        for name in ("out", "err", "calls")
    )
    return Ended(status, out, err, int(calls or 0))


def run(main, words, folder: Path, **how) -> Ended:
    return end(start(main, words, folder, **how), folder)


def run_here(main, words, folder: Path) -> Ended:
    """The same without another child, in one that was started with this folder."""
    for fd in (1, 2):
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
    status = status_of(main, words)
    sys.stdout.flush()
    sys.stderr.flush()
    return Ended(status, *((folder / x).read_text(errors="replace") for x in ("out", "err")))


def in_a_child(tries: Callable[[], Iterator[str]], folder: Path, **how) -> Iterator[str]:
    """What tries() yields, in one child; and one more try where the child breaks off."""

    results = folder / "results"

    def main(_):
        with open(results, "w", encoding="utf-8", errors="replace") as lines:
            for found in tries():
                lines.write(found.replace("\n", " | ") + "\n")
                lines.flush()
        return 0

    ended = run(main, [], folder, **how)
    yield from results.read_text(encoding="utf-8").split("\n")[:-1]
    if ended.status:
        yield f"broke off: {ended}"


# -------------------------------------------------------------------------------------- the judge


def one_line(ended: Ended) -> str:
    """ "" where a command ended with one error for people, else what happened."""
    lines = ended.err.splitlines()
    errors = [k for k, line in enumerate(lines) if line.startswith("error: ")]
    before = lines[: errors[0]] if errors else lines
    expected = all(" are ignored: " in line for line in before)
    if ended.status in (1, 2) and len(errors) == 1 and expected and len(lines) < 15:
        if "Traceback" not in ended.err and "out of memory" not in ended.err:
            return ""
    return f"no error in one line: {ended}"


def fine_or_one_line(ended: Ended) -> str:
    return "" if ended.status == 0 and "Traceback" not in ended.err else one_line(ended)


def flip(data: bytes, random: Random) -> bytes:
    """One bit flipped, or cut somewhere, or its end zeroed as by a disk that never wrote it."""
    if not data:
        return b"\0"
    at, how = random.randrange(len(data)), random.randrange(4)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + bytes(len(data) - at)
    changed = bytearray(data)
    changed[at] ^= 1 << random.randrange(8)
    return bytes(changed)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)
