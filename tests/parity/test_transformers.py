"""The real SmolLM2-135M-Instruct against transformers (test_families.py has the random models)."""

from pathlib import Path
from pydoc_data.topics import (
    topics,
)  # Python's manual, which comes with Python: prose that every machine has

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
    """The token ids of 100 passages of 20 to 400 tokens, one or more whole paragraphs each, from all over Python's manual."""
    paragraphs = [p for topic in sorted(topics) for p in topics[topic].split("\n\n")]
    found: list[list[int]] = []
    for i in range(0, len(paragraphs), 10):
        ids = tokenizer.encode("\n\n".join(paragraphs[i : i + 1 + len(found) % 5]))
        if 20 <= len(ids) <= 400 and ids not in found:
            found.append(ids)
    return [found[i * len(found) // 100] for i in range(100)]


@needs_smol
def test_smollm2_is_the_same_model(tmp_path, measured, measured_nats):
    """All logits and the log-likelihoods of 100 real texts, greedy continuations of three of them, and BNF's gradients."""
    tokenizer, ours, theirs = (
        load_tokenizer(SMOL),
        load(SMOL),
        transformers.AutoModelForCausalLM.from_pretrained(SMOL),
    )
    save(ours, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    found = texts(tokenizer)
    assert len({tuple(ids) for ids in found}) == 100 and sum(map(len, found)) > 8000
    logits, saved, likelihoods = 0.0, 0.0, 0.0
    with torch.no_grad():
        for i, ids in enumerate(found):
            row = torch.tensor([ids])
            z, expected = ours(row), theirs(row).logits
            logits = max(logits, float((z - expected).abs().max()))
            nats = [
                x[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None]).sum() for x in (z, expected)
            ]
            likelihoods = max(likelihoods, abs(float(nats[0] - nats[1])))
            if i < 10:
                saved = max(saved, float((again(row).logits - expected).abs().max()))
    prompts = [ids[:20] for ids in found[::40]]
    greedy = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [theirs.generate(torch.tensor([ids]), **greedy)[0, 20:].tolist() for ids in prompts]
    assert generate(ours, prompts, max_new_tokens=32, temperature=0) == expected
    gradients = difference_of_gradients(
        theirs, ours, tuple(found[0]), tuple(tuple(ids[:40]) for ids in found[1:4])
    )
    measured(REAL, sum(map(len, expected)), logits=logits, saved=saved, gradients=gradients)
    measured_nats(likelihoods)


@needs_smol
def test_smollm2_knows_the_capital_of_france():
    tokenizer, model = load_tokenizer(SMOL), load(SMOL)
    prompt = tokenizer.encode_chat(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    (answer,) = generate(
        model, [prompt], max_new_tokens=20, temperature=0, stop_ids=tokenizer.end_ids
    )
    assert tokenizer.decode(answer) == "The capital of France is Paris."
