"""transformers as an independent judge of the model: random tiny ones made by it, and the real SmolLM2."""

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the parity extra is not installed: make parity")

from minibnf.checkpoint import load, save  # noqa: E402
from minibnf.generate import generate  # noqa: E402
from minibnf.tokenizer import load_tokenizer  # noqa: E402

SMOL = Path(__file__).parents[2] / "weights" / "smollm2-135m-instruct"
needs_smol = pytest.mark.skipif(not SMOL.is_dir(), reason="weights/smollm2-135m-instruct is not there: make weights")


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 8), (6, 2, 10), (3, 1, 16), (12, 3, 4)])
@pytest.mark.parametrize("tied", [True, False])
def test_random_llamas_both_ways(tmp_path, heads, kv_heads, head_dim, tied):
    config = transformers.LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=60, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied, max_position_embeddings=64,
        rms_norm_eps=1e-5, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(heads)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    ours = load(tmp_path / "theirs")
    tokens = torch.randint(131, (3, 17))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    new = generate(ours, tokens[:, :5].tolist(), max_new_tokens=12, temperature=0)
    expected = theirs.generate(tokens[:, :5], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert new == expected[:, 5:].tolist()
    save(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)


@needs_smol
@torch.no_grad()
def test_smollm2_gives_the_same_logits():
    tokenizer = load_tokenizer(SMOL)
    text = tokenizer.encode_chat(
        [{"role": "user", "content": "Translate 'Welcome' into German."}, {"role": "assistant", "content": "Willkommen."}]
    )
    ours, theirs = load(SMOL), transformers.AutoModelForCausalLM.from_pretrained(SMOL)
    torch.testing.assert_close(ours(torch.tensor([text])), theirs(torch.tensor([text])).logits, rtol=0, atol=1e-5)


@needs_smol
@torch.no_grad()
def test_smollm2_reads_a_plain_sentence_with_the_likelihood_it_should():
    """Left permuted as GGUF stores them, the q and k projections still answer "Paris"; a likelihood tells."""
    tokenizer, model = load_tokenizer(SMOL), load(SMOL)
    ids = torch.tensor([tokenizer.encode("The sun rises in the east and sets in the west, and the moon follows it at night.")])
    nll = -model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).mean()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(SMOL)(ids, labels=ids).loss
    assert nll.item() == pytest.approx(theirs.item(), abs=1e-4)


@needs_smol
def test_smollm2_knows_the_capital_of_france():
    tokenizer, model = load_tokenizer(SMOL), load(SMOL)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True)
    (answer,) = generate(model, [prompt], max_new_tokens=20, temperature=0, stop_ids=tokenizer.end_ids)
    assert tokenizer.decode(answer) == "The capital of France is Paris."
