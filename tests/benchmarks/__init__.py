"""Benchmarks: `make bench`. Ratios, both sides in one run, on CUDA where there is a device."""

import resource
import time
from itertools import pairwise
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> str:
    if DEVICE == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"no CUDA device here; {threads} threads of the processor, torch {torch.__version__}"


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def now():
    """Now; on CUDA, when the device will have come so far: nothing waits."""
    if DEVICE == "cuda":
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
    return time.perf_counter()


def seconds(marks: list) -> list[float]:
    """Between each of now()'s marks and the next."""
    wait()
    on_gpu = DEVICE == "cuda"
    return [a.elapsed_time(b) / 1e3 if on_gpu else b - a for a, b in pairwise(marks)]


def peak_bytes() -> int:
    """The most memory that this process had so far: the device's, or the resident size.

    On Linux ru_maxrss would begin with that of the process that started this one, so the kernel's
    own count is read.
    """
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
