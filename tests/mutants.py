"""What `make mutants` ends with: the share of mutants killed, and each survivor with the reason why it may live.

A mutant is one small change of the code; it is killed if a test fails. Those listed in EQUIVALENT behave as the original does,
or differ only in what no test should fix (a threshold between two formulas that are both right there).
"""

import subprocess
import sys
from pathlib import Path

MUTMUT = Path(sys.executable).parent / "mutmut"
EQUIVALENT = {  # a fragment of the changed line -> why the change is none
    "needs_input_grad[:3]": "the third input, targets, holds integers and never needs a gradient",
    "device=None": "on a CPU the device by default is the right one; the tests have no other",
    "torch.float32, )": "on a CPU the device by default is the right one; the tests have no other",
    "torch.int64, )": "on a CPU the device by default is the right one; the tests have no other",
    ">= 1e-2": "where rounding ends is a convention",
    "near = a >": "both forms of log(1 - e^a) are accurate around the threshold",
    "near, torch.log(": "only what the branch not taken is given, any finite value",
    "ref_logps[i].to(None)": "type promotion gives the same dtype",
    "preferred.to(None)": "type promotion gives the same dtype",
    "logps - ref_logps, 1.0)": "only what the branch not taken is given",
    "E <= torch.finfo": "at the smallest normal number both sides agree to rounding",
    "torch.where(certain, 2.0, E)": "only what the branch not taken is given",
    "torch.where(middle, x, 2.0)": "only what the branch not taken is given",
    "break": "the hyper-parameter that is skipped is the last one of its loss",
    "lone = None": "on a CPU the other half of the condition finds the same; this half is for devices that it would wait for",
    "lone = 3 *": "on a CPU the other half of the condition finds the same; this half is for devices that it would wait for",
    "logps.dtype == dtype or": "converting what needs no conversion changes nothing",
}


def run(*arguments: str) -> str:
    return subprocess.run([MUTMUT, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    verdicts = [
        line.strip().rsplit(": ", 1)
        for line in run("results", "--all", "true").splitlines()
        if ": " in line
    ]
    counts: dict[str, int] = {}
    for _, verdict in verdicts:
        counts[verdict] = counts.get(verdict, 0) + 1
    killed = sum(n for verdict, n in counts.items() if verdict in ("killed", "timeout"))
    print(
        f"\n{len(verdicts)} mutants: "
        + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    )
    unexplained = 0
    for name, verdict in verdicts:
        if verdict not in ("killed", "timeout"):
            changed = [
                line[1:].strip()
                for line in run("show", name).splitlines()
                if line[:1] == "+" and line[:3] != "+++"
            ]
            reason = next(
                (why for fragment, why in EQUIVALENT.items() if fragment in " ".join(changed)), None
            )
            unexplained += reason is None
            print(
                f"{verdict}  {name}\n    {' '.join(changed)}\n    {reason or 'NOT EXPLAINED: a test is missing'}"
            )
    share = killed / max(1, len(verdicts))
    print(f"\n{100 * share:.1f}% killed; {unexplained} survivors unexplained")
    return 0 if len(verdicts) >= 100 and share >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
