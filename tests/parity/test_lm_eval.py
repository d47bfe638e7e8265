"""lm-eval as an independent judge: it loads an aligned model as it is, and reads it as we do."""

import json
import shlex
from pathlib import Path

import pytest
import torch

huggingface = pytest.importorskip(
    "lm_eval.models.huggingface", reason="lm-eval is not installed: make parity"
)
pytest.importorskip("google.protobuf", reason="protobuf is not installed: make parity")

from lm_eval.__main__ import cli_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from minibnf import evaluate  # noqa: E402
from minibnf.data import Example  # noqa: E402
from minibnf.files.tokenizer import load_tokenizer  # noqa: E402
from minibnf.lab.language import QUESTIONS, grammar  # noqa: E402
from minibnf.model import load  # noqa: E402
from minibnf.train import main as train  # noqa: E402
from tests.test_train import rows, write  # noqa: E402

ROOT = Path(__file__).parents[2]
TINY = ROOT / "weights" / "tiny"


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """The folder of a model that the trainer wrote: three steps of BNF from weights/tiny."""
    folder = tmp_path_factory.mktemp("lm_eval")
    data = write(folder / "pairs.jsonl", rows(12))
    words = ["--model", TINY, "--data", data, "--out", folder / "run", "--batch-size", 4]
    assert train([*map(str, words), "--device", "cpu"]) == 0
    return folder / "run" / "model"


def log_likelihoods(folder, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """Ours, of the second text of each pair after the first; the end of a turn is not counted."""
    tokenizer = load_tokenizer(folder)
    examples = []
    for line, (prompt, text) in enumerate(pairs):
        response = tuple(tokenizer.encode(text, continuation=True))
        examples.append(Example(tuple(tokenizer.encode(prompt)), (response,), (True,), line))
    return evaluate.measure(load(folder), examples).sums


def test_lm_eval_gives_an_aligned_model_the_same_log_likelihoods(aligned):
    before, after = load(TINY).parameters(), load(aligned).parameters()
    assert not all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    pairs = [("<|user|>How old is Zoe?<|end|><|assistant|>", "Zoe, née Grün, is 25.")]
    for question, about in list(QUESTIONS.items())[:9]:
        prompt, answers = f"Question: {question}\nAnswer:", grammar(*about)
        pairs += [(prompt, f" {answers['curt'][0]}"), (prompt, f" {answers['rude'][0]}")]
    judge = huggingface.HFLM(pretrained=str(aligned), device="cpu", dtype="float32", batch_size=3)
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = [nats for nats, _ in judge.loglikelihood(asked)]
    assert log_likelihoods(aligned, pairs).tolist() == pytest.approx(theirs, abs=1e-3)


def test_the_command_that_evaluate_documents_runs_offline(aligned, tmp_path, monkeypatch):
    """And its accuracies are those that our log-likelihoods give."""
    (command,) = [line for line in evaluate.__doc__.splitlines() if "lm_eval run" in line]
    words = shlex.split(command.replace("OUT/model", str(aligned)))
    printed = []
    monkeypatch.setattr("lm_eval.utils.make_table", lambda found, *_: printed.append(found))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("sys.argv", [*words, "--device", "cpu"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    cli_evaluate()
    theirs = printed[0]["results"]["small_world"]

    data = Path(__file__).with_name("small_world.jsonl")
    asked = [json.loads(line) for line in data.read_text().splitlines()]
    prompts = [f"<|user|>{row['question']}<|end|><|assistant|>" for row in asked]
    pairs = [(p, text) for p, row in zip(prompts, asked, strict=True) for text in row["choices"]]
    nats = log_likelihoods(aligned, pairs).view(len(asked), -1)
    characters = torch.tensor([[len(text) for text in row["choices"]] for row in asked])
    answers = torch.tensor([row["answer"] for row in asked])
    accuracy = (nats.argmax(1) == answers).double().mean().item()
    normed = ((nats / characters).argmax(1) == answers).double().mean().item()
    assert (theirs["acc,none"], theirs["acc_norm,none"]) == (accuracy, normed)
    assert accuracy != normed, "the two are to differ here"
