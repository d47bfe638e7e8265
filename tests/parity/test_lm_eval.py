"""lm-eval as an independent judge: it loads an aligned model as it is, and reads and counts as minibnf.evaluate does."""

import json
import random
from pathlib import Path

import pytest
import torch

huggingface = pytest.importorskip(
    "lm_eval.models.huggingface", reason="lm-eval is not installed: make parity"
)
pytest.importorskip("google.protobuf", reason="protobuf is not installed: make parity")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402

from minibnf.data import Example  # noqa: E402
from minibnf.evaluate import main as evaluate  # noqa: E402
from minibnf.files.tokenizer import load_tokenizer  # noqa: E402
from minibnf.lab.language import QUESTIONS, grammar  # noqa: E402
from minibnf.model import load  # noqa: E402
from minibnf.step import read_responses  # noqa: E402
from minibnf.train import main as train  # noqa: E402
from tests.test_train import rows, write  # noqa: E402

TINY = Path(__file__).parents[2] / "weights" / "tiny"


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """The folder of a model that the trainer wrote: three steps of BNF from weights/tiny."""
    folder = tmp_path_factory.mktemp("lm_eval")
    data = write(folder / "pairs.jsonl", rows(12))
    arguments = [
        "--model",
        TINY,
        "--data",
        data,
        "--out",
        folder / "run",
        "--batch-size",
        4,
        "--device",
        "cpu",
    ]
    assert train(list(map(str, arguments))) == 0
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def judge(aligned):
    return huggingface.HFLM(pretrained=str(aligned), device="cpu", dtype="float32", batch_size=3)


def test_lm_eval_gives_an_aligned_model_the_same_log_likelihoods(aligned, judge):
    model, tokenizer = load(aligned), load_tokenizer(aligned)
    assert any(
        not torch.equal(p, q)
        for p, q in zip(model.parameters(), load(TINY).parameters(), strict=True)
    )
    pairs = [
        (f"Question: {q}\nAnswer:", f" {grammar(*about)[s][0]}")
        for q, about in list(QUESTIONS.items())[:9]
        for s in ("curt", "rude")
    ]
    pairs.append(("<|user|>How old is Zoe?<|end|><|assistant|>", "Zoe, née Grün, is 25."))
    theirs = judge.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    )
    ids = [(tokenizer.encode(p), tokenizer.encode(c, continuation=True)) for p, c in pairs]
    ours = read_responses(model, [Example(tuple(p), (tuple(c),), (True,), 1) for p, c in ids])
    assert [x.sum().item() for x in ours] == pytest.approx([x for x, _ in theirs], abs=1e-3)


def test_lm_eval_counts_the_same_accuracies_of_multiple_choice(aligned, judge, tmp_path):
    rng, metrics = random.Random(0), ("acc", "acc_norm", "acc_bytes")
    spelt = lambda: (
        "".join(rng.choices(rng.choice(["abcdefg 12", "éüßñ–«"]), k=rng.randint(1, 30))).strip()
        or "?"
    )
    asked = [
        {
            "prompt": f"Question: {question}\nAnswer:",
            "choices": [spelt() for _ in range(4)],
            "answer": rng.randrange(4),
        }
        for question in list(QUESTIONS)[::2]
    ]
    task = {
        "task": "own", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(write(tmp_path / "theirs.jsonl", asked))}, "cache_dir": str(tmp_path)},
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
    }  # fmt: skip
    theirs = simple_evaluate(model=judge, tasks=[task], bootstrap_iters=0)["results"]["own"]
    ours = [
        row | {"choices": [f" {text}" for text in row["choices"]]} for row in asked
    ]  # lm-eval puts the space itself
    data, out = write(tmp_path / "ours.jsonl", ours), tmp_path / "found.json"
    assert (
        evaluate(
            ["--model", str(aligned), "--data", str(data), "--out", str(out), "--device", "cpu"]
        )
        == 0
    )
    found = json.loads(out.read_text())["figures"]
    for name, metric in (("", "acc"), (" / character", "acc_norm"), (" / byte", "acc_bytes")):
        assert found[f"accuracy by log-likelihood{name}"]["value"] == pytest.approx(
            theirs[f"{metric},none"], abs=1e-9
        )
    assert len({theirs[f"{m},none"] for m in metrics}) == 3, "the three are to differ here"
