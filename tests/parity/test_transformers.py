"""The real SmolLM2-135M-Instruct against transformers (test_families.py has the random models)."""

from pathlib import Path
from pydoc_data.topics import topics  # Python's manual: prose that every machine has

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="the parity extra is not installed: make parity"
)

from minibnf.files.tokenizer import load_tokenizer  # noqa: E402
from minibnf.generate import generate  # noqa: E402
from minibnf.model import load, save  # noqa: E402
from tests.parity.conftest import REAL  # noqa: E402
from tests.parity.test_families import difference_of_gradients  # noqa: E402

SMOL = Path(__file__).parents[2] / "weights" / "smollm2-135m-instruct"
needs_smol = pytest.mark.skipif(
    not SMOL.is_dir(), reason="weights/smollm2-135m-instruct is not there: make weights"
)


def texts(tokenizer) -> list[list[int]]:
    """The token ids of 100 passages of Python's manual, whole paragraphs of 20 to 400 tokens."""
    paragraphs = [p for topic in sorted(topics) for p in topics[topic].split("\n\n")]
    passages: list[list[int]] = []
    for i in range(0, len(paragraphs), 10):
        ids = tokenizer.encode("\n\n".join(paragraphs[i : i + 1 + len(passages) % 5]))
        if 20 <= len(ids) <= 400 and ids not in passages:
            passages.append(ids)
    return [passages[i * len(passages) // 100] for i in range(100)]


def nats(logits: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """The log-likelihood of all tokens of a row (1, T) but the first, from its logits (1, T, V)."""
    return logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None]).sum()


@needs_smol
def test_smollm2_is_the_same_model(tmp_path, measured, measured_nats):
    """Logits and log-likelihoods of 100 texts, greedy continuations, and the gradients of BNF."""
    tokenizer, ours = load_tokenizer(SMOL), load(SMOL)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(SMOL)
    save(ours, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    passages = texts(tokenizer)
    assert len(set(map(tuple, passages))) == 100 and sum(map(len, passages)) > 8000
    logits, saved, likelihoods = 0.0, 0.0, 0.0
    with torch.no_grad():
        for i, ids in enumerate(passages):
            row = torch.tensor([ids])
            z, expected = ours(row), theirs(row).logits
            logits = max(logits, float((z - expected).abs().max()))
            likelihoods = max(likelihoods, abs(float(nats(z, row) - nats(expected, row))))
            if i < 10:
                saved = max(saved, float((again(row).logits - expected).abs().max()))
    prompts = [ids[:20] for ids in passages[::40]]
    greedy = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [theirs.generate(torch.tensor([ids]), **greedy)[0, 20:].tolist() for ids in prompts]
    assert generate(ours, prompts, max_new_tokens=32, temperature=0) == expected
    responses = tuple(tuple(ids[:40]) for ids in passages[1:4])
    gradients = difference_of_gradients(theirs, ours, tuple(passages[0]), responses)
    measured(REAL, sum(map(len, expected)), logits=logits, saved=saved, gradients=gradients)
    measured_nats(likelihoods)


@needs_smol
def test_smollm2_knows_the_capital_of_france():
    tokenizer, model = load_tokenizer(SMOL), load(SMOL)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode_chat(question, add_generation_prompt=True)
    how = {"max_new_tokens": 20, "temperature": 0, "stop_ids": tokenizer.end_ids}
    (answer,) = generate(model, [prompt], **how)
    assert tokenizer.decode(answer) == "The capital of France is Paris."
