"""Every family of config.py against transformers: 20 random tiny models each, made and saved by it.

Logits, padded and packed; greedy generation with the cache, token for token; what minibnf saves, loaded by transformers;
and the gradient of BNF in every parameter against autograd through transformers' logits.
"""

import random

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the parity extra is not installed: make parity")

from minibnf.checkpoint import load, save  # noqa: E402
from minibnf.data import Example, pack  # noqa: E402
from minibnf.forward import loss_and_logps  # noqa: E402
from minibnf.generate import generate  # noqa: E402
from minibnf.losses import LOSSES  # noqa: E402
from minibnf.responses import Responses  # noqa: E402

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "Llama": lambda rng: {"attention_bias": rng.random() < 0.3, "mlp_bias": rng.random() < 0.3},
    "Llama 3": lambda rng: {"rope_parameters": LLAMA3 | {"factor": rng.choice([2.0, 8.0])}},
    "Mistral": lambda rng: {"sliding_window": rng.choice([None, 3, 5, 50])},
    "Qwen2": lambda rng: rng.choice([{}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}]),
    "Qwen3": lambda rng: {"attention_bias": rng.random() < 0.3},
    "SmolLM3": lambda rng: {"no_rope_layer_interval": rng.choice([2, 3, 4])},
    "Gemma2": lambda rng: {"sliding_window": rng.choice([3, 6, 50]), "query_pre_attn_scalar": rng.choice([4, 9, 32]),
                           "attn_logit_softcapping": rng.choice([None, 2.0, 50.0]),
                           "final_logit_softcapping": rng.choice([None, 3.0, 30.0])},
    "Gemma3": lambda rng: {"sliding_window": rng.choice([3, 6, 50]), "layer_types": rng.choice([SLIDING, None]),
                           "query_pre_attn_scalar": rng.choice([4, 16])},
}  # fmt: skip


def theirs_of(family: str, seed: int):
    rng = random.Random(f"{family} {seed}")
    kv = rng.choice([1, 2, 3])
    heads = kv * rng.choice([1, 2, 3])
    name = {"Llama 3": "Llama", "Gemma3": "Gemma3Text"}.get(family, family)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=61, hidden_size=heads * rng.choice([4, 8]), intermediate_size=rng.choice([20, 33]), num_hidden_layers=3,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=rng.choice([4, 6, 10]), max_position_embeddings=64,
        tie_word_embeddings=rng.random() < 0.5, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **FAMILIES[family](rng),
    )  # fmt: skip
    torch.manual_seed(seed)
    causal = "Gemma3ForCausalLM" if family == "Gemma3" else f"{name}ForCausalLM"
    model = getattr(transformers, causal)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():  # norms and biases too, which would be 1 and 0
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model, rng


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_of_each_family(tmp_path, family, seed):
    theirs, rng = theirs_of(family, seed)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=rng.choice(["20KB", "1GB"]))
    ours = load(tmp_path / "theirs")
    tokens = torch.randint(3, 61, (2, 14))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=1e-5, atol=1e-5)

    new = generate(ours, tokens[:, :5].tolist(), max_new_tokens=9, temperature=0)
    greedy = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert new == theirs.generate(tokens[:, :5], **greedy)[:, 5:].tolist()

    save(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, expected, rtol=0, atol=0)

    check_gradient(theirs, ours)


def check_gradient(theirs, ours):
    """BNF of one pair and an unpaired response that shares its prompt, packed, against padded rows through transformers."""
    prompt = (5, 6, 7, 8)
    found = [
        Example(prompt, ((9, 10, 11, 2), (9, 12, 2)), (True, False), 1),
        Example(prompt, ((13, 14, 15, 16, 2),), (True,), 2),
    ]
    (batch,) = pack(found, [0, 1], 100)
    rows = [torch.tensor([[*prompt, *found[i].responses[k]]]) for i, k in batch.order]
    logps = torch.cat([
        theirs(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, row[0, len(prompt) :, None])[:, 0] for row in rows
    ])  # fmt: skip
    ref = logps.detach() + 0.5 * torch.sin(torch.arange(len(logps)))
    ref = ref.clamp(max=-1e-3)
    LOSSES["bnf"](Responses(logps, ref, batch.owner, batch.preferred, batch.pairs)).backward()
    loss, _ = loss_and_logps(ours, batch, LOSSES["bnf"], {"length": "shorter"}, ref, torch.float32)
    loss.backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        scale = expected[name].grad.abs().max()
        torch.testing.assert_close(
            p.grad, expected[name].grad, rtol=1e-3, atol=2e-5 * float(scale) + 1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
