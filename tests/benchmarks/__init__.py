"""Benchmarks: `make bench`. Ratios, both sides in one run."""

import resource
from pathlib import Path


def peak_bytes() -> int:
    """The largest resident size of this process so far. On Linux ru_maxrss would begin with that of the process that started
    it, so it is read from the kernel's own count."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
