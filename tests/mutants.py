"""What `make mutants` ends with: the share of mutants killed, and each survivor with the reason why it may live.

A mutant is one small change of the code; it is killed if a test fails. Those listed in EQUIVALENT behave as the original does,
or differ only in what no test should fix (a threshold between two formulas that are both right there).
"""

import subprocess
import sys
from pathlib import Path

MUTMUT = Path(sys.executable).parent / "mutmut"
EQUIVALENT: dict[str, str] = {}  # a fragment of the changed line -> why the change is none


def run(*arguments: str) -> str:
    return subprocess.run([MUTMUT, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    verdicts = [line.strip().rsplit(": ", 1) for line in run("results", "--all", "true").splitlines() if ": " in line]
    counts: dict[str, int] = {}
    for _, verdict in verdicts:
        counts[verdict] = counts.get(verdict, 0) + 1
    killed = sum(n for verdict, n in counts.items() if verdict in ("killed", "timeout"))
    print(f"\n{len(verdicts)} mutants: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())))
    unexplained = 0
    for name, verdict in verdicts:
        if verdict not in ("killed", "timeout"):
            changed = [line[1:].strip() for line in run("show", name).splitlines() if line[:1] == "+" and line[:3] != "+++"]
            reason = next((why for fragment, why in EQUIVALENT.items() if fragment in " ".join(changed)), None)
            unexplained += reason is None
            print(f"{verdict}  {name}\n    {' '.join(changed)}\n    {reason or 'NOT EXPLAINED: a test is missing'}")
    share = killed / max(1, len(verdicts))
    print(f"\n{100 * share:.1f}% killed; {unexplained} survivors unexplained")
    return 0 if len(verdicts) >= 100 and share >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
