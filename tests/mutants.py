"""What `make mutants` ends with: the share of mutants killed, and why each survivor may live.

A mutant is one small change of the code; it is killed if a test fails. Those listed in EQUIVALENT
behave as the original does, or differ only in what no test should fix (a threshold between two
formulas that are both right there).
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

MUTMUT = Path(sys.executable).parent / "mutmut"
OTHER_HALF = (
    "on a CPU the other half of the condition finds the same; "
    "this half is for devices that it would wait for"
)
EQUIVALENT = {  # a fragment of the changed line -> why the change is none
    ">= 1e-2": "where rounding ends is a convention",
    "near = a >": "both forms of log(1 - e^a) are accurate around the threshold",
    "where(near, a, -2.0)": "only what the branch not taken is given, any finite value",
    "where(near, -2.0, a)": "only what the branch not taken is given, any finite value",
    "where(near, a, +1.0)": "only what the branch not taken is given",
    "where(near, +1.0, a)": "only what the branch not taken is given",
    "t()).to(None)": "the same in float32; in bfloat16 blocks are added with a rounding more",
    "preferred.to(None)": "type promotion gives the same dtype",
    "logps - ref_logps, 1.0)": "only what the branch not taken is given",
    "E <= torch.finfo": "at the smallest normal number both sides agree to rounding",
    "torch.where(certain, 2.0, E)": "only what the branch not taken is given",
    "torch.where(middle, x, 2.0)": "only what the branch not taken is given",
    "ROW_LOGITS[kind(unembed)]": "a chunk at the bound may be read once or twice: the same result",
    "for k in range(1, count + 2)": "a share beyond the end is nearest to the end too",
    "wanted[1]) or True": "what nobody asks for is not used: this decides memory alone",
    "whole_lengths.to(None)": "type promotion gives the same dtype",
    "def _rival": "losses are made at import, before a mutant is chosen",
    "judge is None": "without a loss nothing is pushed: this decides memory alone",
    "lone = None": OTHER_HALF,
    "lone = 3 *": OTHER_HALF,
}


def run(*arguments: str) -> str:
    return subprocess.run([MUTMUT, *arguments], capture_output=True, text=True, check=True).stdout


def changed_line(name: str) -> str:
    """What a mutant has in place of the original's line."""
    lines = run("show", name).splitlines()
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    return " ".join(line[1:].strip() for line in added)


def main() -> int:
    lines = run("results", "--all", "true").splitlines()
    verdicts = [line.strip().rsplit(": ", 1) for line in lines if ": " in line]
    counts = Counter(verdict for _, verdict in verdicts)
    killed = counts["killed"] + counts["timeout"]
    shown = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    print(f"\n{len(verdicts)} mutants: {shown}")
    unexplained = 0
    for name, verdict in verdicts:
        if verdict in ("killed", "timeout"):
            continue
        line = changed_line(name)
        reason = next((why for fragment, why in EQUIVALENT.items() if fragment in line), None)
        unexplained += reason is None
        reason = reason or "NOT EXPLAINED: a test is missing"
        print(f"{verdict}  {name}\n    {line}\n    {reason}")
    share = killed / max(1, len(verdicts))
    print(f"\n{100 * share:.1f}% killed; {unexplained} survivors unexplained")
    return 0 if len(verdicts) >= 100 and share >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
