"""`make check-gpu`: what it measures with, on a tiny shape; what it says without a card."""

import json
import subprocess
import sys

import pytest
import torch

from minibnf.check import report
from minibnf.files.tokenizer import load_tokenizer
from minibnf.data import read_examples
from tests.benchmarks import gpu, memory, training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    gpu.write_checkpoint(folder / "model", gpu.TINY)
    gpu.write_pairs(folder / "pairs.jsonl", 8, gpu.TINY["vocab_size"])
    return folder


def test_a_random_checkpoint_is_whole_and_in_bfloat16(folder):
    assert "bfloat16" in report(folder / "model", values=True)
    assert load_tokenizer(folder / "model").vocab_size == gpu.TINY["vocab_size"]


def test_both_tokenizers_give_the_same_ids(folder):
    """As TRL asks for them: of the prompt, and of prompt and response with </s> together."""
    transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "model")
    ours = load_tokenizer(folder / "model")
    examples, _ = read_examples(folder / "pairs.jsonl", ours, 2048)
    rows = list(map(json.loads, (folder / "pairs.jsonl").read_text().splitlines()))
    assert len(rows) == len(examples) == 8
    for row, example in zip(rows, examples, strict=True):
        assert theirs(row["prompt"])["input_ids"] == list(example.prompt)
        for side, response in zip(("chosen", "rejected"), example.responses, strict=True):
            whole = theirs(row["prompt"] + row[side] + "</s>")["input_ids"]
            assert whole == [*example.prompt, *response]
        assert theirs.decode(example.prompt) == ours.decode(example.prompt, skip_special=False)
        assert 0 not in example.prompt + example.responses[0]  # <unk>


def test_the_pairs_lengths_are_gsm8ks(folder, tmp_path):
    file = gpu.write_pairs(tmp_path / "many.jsonl", 1000, gpu.TINY["vocab_size"])
    examples, _ = read_examples(file, load_tokenizer(folder / "model"), 2048)
    lengths = torch.tensor([[len(e.prompt), *map(len, e.responses)] for e in examples]).double()
    assert lengths.quantile(0.5, 0).tolist() == pytest.approx(
        [gpu.PROMPT[4], gpu.CHOSEN[4], gpu.REJECTED[4]], rel=0.08
    )
    assert lengths.mean(0).tolist() == pytest.approx([89.5, 126, 117], rel=0.08)
    assert 0.4 < torch.corrcoef(lengths.T)[1, 2] < 0.8


def test_the_minibnf_side_trains_two_steps_and_saves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "matrix_speed", lambda dtype: 1e12)  # it takes its time
    _, _, rest = gpu.jobs()[0]
    job = {
        "model": str(folder / "model"), "file": str(folder / "pairs.jsonl"), "pairs": 4, "steps": 2,
        "dtype": "bfloat16",
    } | rest  # fmt: skip
    found = training.ours(job, tmp_path)
    assert found["pairs_per_s"] > 0 and len(found["step_s"]) == 1
    assert 0 < found["share"] and found["peak_gb"] > 0 and found["operations"] > 1e6
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert "metrics.jsonl" in made and not made & {"model", "checkpoints", "figures"}


def test_the_table_names_ratios_and_failures():
    rows = [
        {"model": "m", "pairs": 8, "side": "minibnf bnf", "pairs_per_s": 30.0,
         "step_s": [0.25, 0.3], "peak_gb": 3.0, "operations": 1e9, "machine": 1e11},
        {"model": "m", "pairs": 8, "side": "TRL dpo, 8 per forward", "pairs_per_s": 10.0,
         "step_s": [0.8], "peak_gb": 4.0},
        {"model": "m", "pairs": 8, "side": "TRL dpo, 16 per forward", "failed": "out of memory"},
    ]  # fmt: skip
    _, _, *lines = gpu.table(rows).splitlines()
    assert lines == [
        "| m | 8 | minibnf bnf | 30.0 | 29.1 | 3.00 | 3.0 | 30.0% |",
        "| m | 8 | TRL dpo, 8 per forward | 10.0 | 10.0 | 1.00 | 4.0 | 10.0% |",
        "| m | 8 | TRL dpo, 16 per forward | failed: out of memory |",
    ]


def test_what_pytest_printed_is_read():
    text = (
        "tests/test_a.py::test_x[a b-1] PASSED   [ 33%]\n"
        "tests/test_a.py::test_y FAILED          [ 66%]\n"
        "tests/test_a.py::test_z SKIPPED (why)   [100%]\n"
        "FAILED tests/test_a.py::test_y - assert 0\n"
        "ERROR tests/test_b.py - ImportError\n"
    )
    found = gpu.outcomes(text)
    assert found["passed"] == ["tests/test_a.py::test_x[a b-1]"]
    assert found["failed"] == ["tests/test_a.py::test_y"]
    assert found["skipped"] == ["tests/test_a.py::test_z"] and found["error"] == ["tests/test_b.py"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_card_it_says_so(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--json", tmp_path / "gpu.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, f"{gpu.NO_CARD}\n")
    assert not (tmp_path / "gpu.json").exists()


def test_the_shapes_have_as_many_parameters_as_published():
    """In millions, as the models' cards count them."""
    published = {
        "SmolLM2-135M": 134.5, "SmolLM2-360M": 361.8, "SmolLM2-1.7B": 1711, "Llama-3.2-1B": 1236,
        "Llama-3.2-3B": 3213, "Qwen3-0.6B": 596, "Qwen3-1.7B": 1721, "Qwen3-4B": 4022,
    }  # fmt: skip
    assert published.keys() == memory.SHAPES.keys()
    for name, millions in published.items():
        _, parameters = memory.size_of(memory.raw_config(name))
        assert parameters / 1e6 == pytest.approx(millions, rel=1e-3), name


def test_more_memory_or_recomputing_never_fits_less():
    c, parameters = memory.size_of(memory.raw_config("Llama-3.2-1B"))
    fits = [[memory.tokens_that_fit(c, parameters, card, again) for card in memory.CARDS]
            for again in (False, True)]  # fmt: skip
    assert all(row == sorted(row) for row in fits) and fits[0][0] == 0 < fits[1][-1]
    assert all(a <= b for a, b in zip(*fits, strict=True))
