"""`make check-gpu`: on a CUDA card, speed and memory against TRL and transformers, and the tests.

    make check-gpu PYTHON=python [JSON=runs/bench/gpu.json]
    python -m tests.benchmarks.gpu [--minutes 8] [--json FILE]

For whoever has a card: send the JSON. It runs with what is installed and downloads nothing: torch,
safetensors, tokenizers, pytest and hypothesis; where trl, liger_kernel or transformers are missing
it says so and measures minibnf alone. Checkpoints of real shapes with random weights (4 GB), a
tokenizer of words and pairs of gsm8k_pairs' lengths are made in a temporary folder.

Measurements come in the order of their weight. What --minutes do not suffice for is named under
"not measured", like what fails under its own name. The last --test-minutes belong to the tests
marked cuda. The JSON is written anew after each measurement, so that what is cut off leaves it.
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from minibnf.files.config import parse_config
from minibnf.model import Transformer, save
from tests.benchmarks import DEVICE
from tests.benchmarks.memory import raw_config
from tests.benchmarks.training import liger_runs, measure

ROOT = Path(__file__).parents[2]
NO_CARD = "no CUDA card here: nothing was measured"
PACKAGES = (
    "torch", "triton", "transformers", "trl", "liger_kernel", "datasets", "accelerate", "tokenizers"
)  # fmt: skip
STEPS = 8
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip

# ------------------------------------------------------------------- random checkpoints and pairs

# Tokens of gsm8k_pairs by SmolLM2's tokenizer and template, 531 pairs: at these shares of the rows
# there are so many or fewer. A response shares about half of its tokens with the other one.
SHARES = (0, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 1)
PROMPT = (54, 65, 68, 74, 86, 100, 116, 128, 173)
CHOSEN = (46, 64, 72, 90, 118, 152, 193, 221, 365)
REJECTED = (37, 58, 66, 83, 103, 139, 188, 218, 369)
SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1 and 2; from 3 on "w3", "w4", ...


def write_checkpoint(folder: Path, raw: dict, seed: int = 0) -> Path:
    """A model of random weights in bfloat16, and a tokenizer of as many words."""
    folder.mkdir()
    raw = raw | {"bos_token_id": 1, "eos_token_id": 2}
    with torch.device(DEVICE):
        torch.manual_seed(seed)
        model = Transformer(parse_config(raw, folder), raw)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.02)
    save(model, folder, torch.bfloat16)
    write_tokenizer(folder, raw["vocab_size"])
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    """tokenizer.json and its config: word "w17" has the id 17; a text begins with <s>."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), size))]
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, text in enumerate(SPECIAL)
    ]  # fmt: skip
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing", "single": [begin, texts[0]], "pair": [begin, *texts],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "WordLevel", "unk_token": "<unk>",
            "vocab": {word: i for i, word in enumerate(words)},
        },
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def quantile(u: float, sizes: tuple) -> int:
    """The size at share u of the rows, between SHARES linearly."""
    i = min(bisect_right(SHARES, u), len(SHARES) - 1)
    share = (u - SHARES[i - 1]) / (SHARES[i] - SHARES[i - 1])
    return round(sizes[i - 1] + share * (sizes[i] - sizes[i - 1]))


def write_pairs(file: Path, count: int, vocabulary: int, seed: int = 0) -> Path:
    """Text rows whose lengths are gsm8k_pairs', with <s> and </s>.

    The longer the chosen response, the longer the rejected one, as there (r = 0.6).
    """
    rng = random.Random(seed)

    def words(n: int) -> list[str]:
        return [f"w{rng.randrange(len(SPECIAL), vocabulary)}" for _ in range(n)]

    rows = []
    for _ in range(count):
        u = rng.random()
        near = abs(u + rng.gauss(0, 0.25))  # from 1 on it turns back, too
        near = max(0.0, 2 - near if near > 1 else near)
        prompt = words(quantile(rng.random(), PROMPT) - 1)
        chosen = words(quantile(u, CHOSEN) - 1)
        n = quantile(near, REJECTED) - 1
        rejected = [word if rng.random() < 0.6 else words(1)[0] for word in chosen[:n]]
        rejected += words(n - len(rejected))
        texts = " ".join(prompt), " " + " ".join(chosen), " " + " ".join(rejected)
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


# ------------------------------------------------------------------------------------ what to do


def jobs() -> list[tuple[str, int, dict]]:
    """(model, pairs per step, the rest of the job), the weightiest first.

    At 16,384 tokens, the trainer's default on CUDA. TRL's numbers of pairs per forward: those that
    were best on an H200 come first.
    """
    billion, small = "Llama-3.2-1B", "SmolLM2-135M"

    def ours(model: str, pairs: int, loss: str) -> tuple:
        return model, pairs, {"side": "minibnf", "loss": loss, "max_tokens": 16384, "save": False}

    def trl(model: str, pairs: int, batch: int, liger: bool = False) -> tuple:
        job = {"side": "trl", "batch": batch, "checkpointing": False, "liger": liger}
        return model, pairs, job

    found = [
        ours(billion, 32, "bnf"), trl(billion, 32, 8), trl(billion, 32, 8, True),
        ours(small, 32, "bnf"), trl(small, 32, 32), trl(small, 32, 32, True),
        ours(billion, 32, "dpo"), trl(billion, 32, 16, True),
        ours(small, 128, "bnf"), trl(small, 128, 32, True), trl(small, 128, 32),
        trl(billion, 32, 16), trl(small, 32, 16, True), trl(small, 32, 16),
        trl(small, 128, 16, True), trl(small, 128, 16),
        trl(billion, 32, 32, True), trl(billion, 32, 32),
        ours(small, 32, "dpo"), ours(small, 128, "dpo"),
    ]  # fmt: skip
    peer, liger = missing("trl", "datasets", "transformers"), liger_runs()
    return [
        job for job in found
        if job[2]["side"] == "minibnf" or (not peer and (liger or not job[2]["liger"]))
    ]  # fmt: skip


def name_of(job: dict) -> str:
    if job["side"] == "minibnf":
        return f"minibnf {job['loss']}"
    return f"TRL{' + Liger' if job['liger'] else ''} dpo, {job['batch']} per forward"


def missing(*packages: str) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def facts() -> dict:
    """The card, the versions, the revision."""
    card = torch.cuda.get_device_properties(0) if DEVICE == "cuda" else None
    return {
        "card": card.name if card else "none",
        "memory_gb": card.total_memory / 1e9 if card else 0.0,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "revision": said("git", "rev-parse", "HEAD"),
        "changed": said("git", "status", "--porcelain", "--untracked-files=no"),
    }


def said(*command: str) -> str | None:
    """What a program says, None where it is not there or fails."""
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------------- the sections


class Session:
    """The time that is left, and what was found, in a file."""

    def __init__(self, file: Path, minutes: float):
        self.file, self.end, self.began = file, time.monotonic() + 60 * minutes, time.monotonic()
        self.found = facts() | {"training": [], "generation": {}, "tests": {}, "not measured": []}

    def left(self) -> float:
        return self.end - time.monotonic()

    def write(self) -> None:
        self.found["minutes"] = (time.monotonic() - self.began) / 60
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def lacks(self, what: str, why: str) -> None:
        print(f"not measured: {what}: {why}", flush=True)
        self.found["not measured"].append({"what": what, "why": why})
        self.write()


def train(session: Session, folder: Path, models: dict[str, dict], reserve: float) -> None:
    """Every job, until `reserve` seconds are left; each model is written when it is first needed.

    models: {name: its config.json}.
    """
    for model, pairs, rest in jobs():
        what, raw = f"{model}, {pairs} pairs per step, {name_of(rest)}", models[model]
        left = session.left() - reserve
        if left < 30:
            session.lacks(what, "the time was up")
            continue
        checkpoint, file = folder / model, folder / f"{model}-{pairs}.jsonl"
        if not checkpoint.is_dir():
            write_checkpoint(checkpoint, raw)
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
        if not file.is_file():
            write_pairs(file, pairs * STEPS, raw["vocab_size"])
        job = {"model": str(checkpoint), "file": str(file), "pairs": pairs, "steps": STEPS}
        began = time.monotonic()
        result = measure(job | {"dtype": "bfloat16"} | rest, timeout=left)
        if result.get("stopped"):
            session.lacks(what, result["failed"])
            continue
        row = {"model": model, "pairs": pairs, "side": name_of(rest)} | result
        session.found["training"].append(row | {"wall_s": round(time.monotonic() - began, 1)})
        session.write()
        told = f"{row['pairs_per_s']:.1f} pairs/s" if "pairs_per_s" in row else row["failed"]
        print(f"{time.monotonic() - began:5.0f} s  {what}: {told}", flush=True)


def table(rows: list[dict]) -> str:
    """Markdown: of each model and number of pairs, minibnf and every way of TRL's."""
    lines = [
        "| model | pairs per step | side | pairs/s | by the median step | ratio to TRL's best "
        "| peak GB | share of the matrix speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["model"], row["pairs"]) for row in rows):
        some = [row for row in rows if (row["model"], row["pairs"]) == key]
        speeds = [row for row in some if "pairs_per_s" in row]
        peers = [row["pairs_per_s"] for row in speeds if row["side"].startswith("TRL")]
        counts = [row["operations"] / row["machine"] for row in speeds if "machine" in row]
        for row in some:
            if row not in speeds:
                lines.append(f"| {key[0]} | {key[1]} | {row['side']} | failed: {row['failed']} |")
                continue
            rate, typical = row["pairs_per_s"], key[1] / statistics.median(row["step_s"])
            cells = [
                *key, row["side"], f"{rate:.1f}", f"{typical:.1f}",
                f"{rate / max(peers):.2f}" if peers else "", f"{row['peak_gb']:.1f}",
                f"{rate * statistics.median(counts):.1%}" if counts else "",
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def generate(session: Session, folder: Path, raw: dict, reserve: float) -> None:
    """64 prompts, 128 new tokens, SmolLM2's shape: tests/benchmarks/generation.py's sides."""
    left, what = session.left() - reserve, "generation"
    if missing("transformers"):
        return session.lacks(what, "transformers is not installed")
    if left < 40:
        return session.lacks(what, "the time was up")
    checkpoint, out = folder / "SmolLM2-135M", folder / "generation.json"
    if not checkpoint.is_dir():
        write_checkpoint(checkpoint, raw)
    file = write_pairs(folder / "prompts.jsonl", 64, raw["vocab_size"], seed=1)
    flags = {"model": checkpoint, "data": file, "dtypes": "bfloat16", "json": out}
    command = [sys.executable, "-m", "tests.benchmarks.generation", "--static"]
    command += [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    text, code = run(command, left)
    print("\n".join(line for line in text.splitlines() if line.startswith("bfloat16")), flush=True)
    if out.is_file():
        session.found["generation"] = json.loads(out.read_text(encoding="utf-8"))
        session.write()
    if code != 0:
        last = text.strip().splitlines()[-1:] or [f"exit {code}"]
        measured = ", ".join(session.found["generation"]) or "nothing"
        why = last[0] if code is not None else "the time was up"
        session.lacks(f"{what} but for {measured}", why)


def run(command: list[str], timeout: float) -> tuple[str, int | None]:
    """(what it printed, its exit status, None where it was stopped)"""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": timeout}
    at_once = os.environ | {"PYTHONUNBUFFERED": "1"}  # what was printed before it was stopped
    try:
        done = subprocess.run(command, cwd=ROOT, env=at_once, **both)
        return done.stdout.decode(errors="replace"), done.returncode
    except subprocess.TimeoutExpired as stopped:
        return (stopped.stdout or b"").decode(errors="replace"), None


def test(session: Session) -> None:
    """The tests marked cuda."""
    if needed := missing("pytest", "hypothesis"):
        return session.lacks("the tests", f"{' and '.join(needed)} not installed")
    flags = ["-v", "-m", "cuda", "-p", "no:cacheprovider", "--tb=short"]
    # their modules only: others may need packages that are not here
    marked = [f for f in (ROOT / "tests").glob("test_*.py") if "mark.cuda" in f.read_text("utf-8")]
    text, code = run(
        [sys.executable, "-m", "pytest", *flags, *map(str, sorted(marked))], max(10, session.left())
    )
    session.found["tests"] = outcomes(text) | {"exit": code}
    session.write()
    counts = session.found["tests"]
    print(", ".join(f"{len(counts[k])} {k}" for k in ("passed", "failed", "error", "skipped")))
    for name in counts["failed"] + counts["error"]:
        print(f"failed: {name}")
    if code is None:
        session.lacks("some of the tests", "the time was up")
    print(text if code not in (0, None) else "", flush=True)


def outcomes(text: str) -> dict:
    """{outcome: names of tests} of what pytest -v printed."""
    lines = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.M)
    found = {kind: [name for name, k in lines if k == kind.upper()]
             for kind in ("passed", "failed", "error", "skipped")}  # fmt: skip
    # a module that cannot be imported has no test to name
    found["error"] += re.findall(r"^ERROR (tests/\S+\.py)(?: |$)", text, re.M)
    return found | {"text": text[-8000:] if found["failed"] or found["error"] else ""}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--json", type=Path, default=ROOT / "runs" / "bench" / "gpu.json")
    p.add_argument("--minutes", type=float, default=8, help="for everything; 30 suffice for all")
    p.add_argument("--test-minutes", type=float, default=2.5, help="of them, for the tests")
    p.add_argument("--revision", help="of the code, where .git is not there to tell it")
    p.add_argument("--shape", choices=["real", "tiny"], default="real", help=argparse.SUPPRESS)
    args = p.parse_args()
    if DEVICE != "cuda" and args.shape == "real":
        print(NO_CARD)
        return 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    session, reserve = Session(args.json, args.minutes), 60 * args.test_minutes
    session.found["revision"] = args.revision or session.found["revision"]
    print(f"{session.found['card']}, {session.found['memory_gb']:.0f} GB; "
          + ", ".join(f"{k} {v}" for k, v in session.found["versions"].items() if v))  # fmt: skip
    models = {n: raw_config(n) if args.shape == "real" else TINY
              for n in ("Llama-3.2-1B", "SmolLM2-135M")}  # fmt: skip
    if absent := missing("trl", "datasets", "transformers"):
        session.lacks("TRL", f"{', '.join(absent)} not installed: minibnf alone is measured")
    elif not liger_runs():
        session.lacks("TRL with Liger", "liger_kernel or triton is not installed")
    with tempfile.TemporaryDirectory() as temporary:
        train(session, Path(temporary), models, reserve + 60)
        generate(session, Path(temporary), models["SmolLM2-135M"], reserve)
    if session.found["training"]:
        print("\n" + table(session.found["training"]) + "\n", flush=True)
    test(session)
    print(f"\nall of it, {session.found['minutes']:.1f} minutes: {args.json}")
    tests = session.found["tests"]
    return (
        1 if tests.get("exit") != 0 or any("failed" in r for r in session.found["training"]) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
