"""`minibnf check`: what it says of a checkpoint, what it finds wrong, and its count of activations against PyTorch's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minibnf.check import layer_bytes, main, memory
from minibnf.files.config import parse_config
from minibnf.model import Transformer, load, save

TINY = Path(__file__).parent.parent / "weights" / "tiny"


@pytest.fixture
def directory(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


def change(directory, **fields):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def test_what_it_says_of_a_checkpoint(directory, capsys):
    assert main([str(directory), "--values"]) == 0
    said = capsys.readouterr().out
    model = load(directory)
    n = sum(p.numel() for p in model.parameters())
    for part in (
        f"model       {directory}: llama", f"{n:,}, {model.unembed.numel():,} of them embeddings, tied",
        "float32, 3.5 MB in 1 file\n",
        "every number finite", "4 of width 128, 4 heads of 32 on 2 of keys and values, MLP 384", "256 tokens\n",
        "672, 672 of them in tokenizer.model", "a template; a turn ends at <|end|> (2)", "2048 tokens a micro-batch",
    ):  # fmt: skip
        assert part in said, part


def test_another_checkpoint_untied_in_two_dtypes_and_shards_with_windows(
    directory, capsys, monkeypatch
):
    model = load(directory)
    monkeypatch.setattr("minibnf.files.safetensors.SHARD_BYTES", 10**6)
    change(directory, model_type="mistral", sliding_window=64, tie_word_embeddings=False)
    raw = json.loads((directory / "config.json").read_text())
    raw.pop("attention_bias"), raw.pop("mlp_bias")
    untied = Transformer(parse_config(raw, "untied"), raw)
    untied.load_state_dict(model.state_dict() | {"lm_head.weight": model.unembed.detach().clone()})
    untied.model.norm.weight.data = untied.model.norm.weight.data.bfloat16()
    save(untied, directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    assert main([str(directory), "--max-tokens", "100"]) == 0
    said = capsys.readouterr().out
    for part in (
        ": mistral", f"{2 * model.unembed.numel():,} of them embeddings, not tied", "bfloat16 and float32", "in 4 files",
        "256 tokens; 4 layers see 64 tokens back", "no template", "100 tokens a micro-batch",
    ):  # fmt: skip
        assert part in said, part


def test_the_token_that_closes_turns_is_named_and_told_where_it_is_not_listed(directory, capsys):
    """As Qwen's base models have it: a text ends at one token, the template's turns at another."""
    config = json.loads((directory / "tokenizer_config.json").read_text()) | {"eos_token": "<s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    change(directory, eos_token_id=1)
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert main([str(directory)]) == 0
    said = capsys.readouterr().out
    assert "a turn ends at <|end|> (2), <s> (1)\n" in said
    warning = "warning: the chat template closes turns with <|end|> (2), which no eos_token_id"
    assert warning in said
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert main([str(directory)]) == 0
    assert "warning" not in capsys.readouterr().out


def edit(directory, change):
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: shutil.rmtree(d), "is no folder"),
        (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), "not a readable"),
        (lambda d: (d / "tokenizer.model").unlink(), "neither tokenizer.json nor tokenizer.model"),
        (lambda d: change(d, rope_scaling={"type": "linear", "factor": 2.0}), "rotary positions"),
        (lambda d: change(d, vocab_size=600), "'model.embed_tokens.weight' is (672, 128), but config.json says (600, 128)"),
        (lambda d: edit(d, lambda s: s.pop(NORM)), f"tensor '{NORM}' is missing (1 of 38 are)"),
        (lambda d: edit(d, lambda s: s.update({NORM: s[NORM].to(torch.int8)})), f"tensor '{NORM}' is I8; quantised"),
        (lambda d: edit(d, lambda s: s.update({"lm_head.weight": torch.zeros(672, 128)})), "lm_head.weight differs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_status_1(directory, capsys, spoil, message):
    spoil(directory)
    assert main([str(directory)]) == 1
    said = capsys.readouterr()
    assert (
        said.out == ""
        and said.err.startswith("error: ")
        and said.err.count("\n") == 1
        and message in said.err
    )


def test_a_number_that_is_not_finite_is_found_where_values_are_asked_for(directory, capsys):
    edit(directory, lambda s: s["model.layers.2.mlp.up_proj.weight"][3, 4:5].fill_(torch.inf))
    assert main([str(directory)]) == 0
    assert main([str(directory), "--values"]) == 1
    assert (
        "model.safetensors: tensor 'model.layers.2.mlp.up_proj.weight' holds a number"
        in capsys.readouterr().err
    )


def test_the_weights_are_not_read(directory, monkeypatch, capsys):
    monkeypatch.setattr("minibnf.check.tensors_of", None)
    monkeypatch.setattr("minibnf.model.tensors_of", None)
    assert main([str(directory)]) == 0


# --------------------------------------------------------------------------------------------------------------- memory


def kept(c, dtype, groups: int, example: int) -> int:
    """Bytes that autograd keeps of a forward of so many packed pairs, the parameters' own aside, counted by PyTorch."""
    model, sizes, found = Transformer(c, {}).init_weights(0), (example - 20, 12, 8), {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    positions = torch.cat(
        [torch.arange(sizes[0]), *(torch.arange(sizes[0], sizes[0] + n) for n in sizes[1:])]
    ).repeat(groups)

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    tokens = torch.randint(c.vocab_size, (1, groups * example))
    layout = [(sizes[0], list(sizes[1:]))] * groups
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(tokens, positions[None], layout, dtype=dtype, head=lambda x, _: x)
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("dtype, b", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize(
    "family, fields",
    [
        ("llama", {}), ("llama", {"num_key_value_heads": 6, "attention_bias": True}), ("qwen2", {}), ("qwen3", {}),
        ("gemma2", {"attn_logit_softcapping": 50.0, "sliding_window": 16}), ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma3_text", {}),
    ],
)  # fmt: skip
def test_activations_are_what_autograd_keeps(family, fields, dtype, b):
    raw = dict(
        model_type=family, vocab_size=50, hidden_size=96, intermediate_size=200, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, query_pre_attn_scalar=16, sliding_window=4096, tie_word_embeddings=True,
    ) | fields  # fmt: skip
    if not family.startswith("gemma"):
        del raw["query_pre_attn_scalar"], raw["sliding_window"]
    of = lambda layers, groups: kept(
        parse_config(raw | {"num_hidden_layers": layers}, "raw"), dtype, groups, 40
    )
    # a layer more in twice the tokens, so that neither weights' copies nor what is kept once a model is in the difference
    each = (of(4, 6) - of(2, 6) - of(4, 3) + of(2, 3)) / (2 * 3 * 40)
    config = parse_config(raw | {"num_hidden_layers": 2}, "raw")
    assert layer_bytes(config, b, 40) == pytest.approx(each, rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_memory_by_hand(tied):
    """One layer of width 8, one head, MLP 16, a vocabulary of 1000; 10 tokens: a chunk of the vocabulary holds them all."""
    raw = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
           "num_attention_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": tied}  # fmt: skip
    c = parse_config(raw, "t")
    n = 4 * 64 + 3 * 128 + 3 * 8 + 8000 * (1 if tied else 2)
    assert n == sum(p.numel() for p in Transformer(c, raw).parameters())
    found = memory(c, n, 10, "float32", example=5)
    norm = 2 * 4 * 8 + 4 * 8 + 4  # what goes in, what is normed, what comes out, a scale
    layer = (
        2 * norm + 2 * 4 * 16 + (3 + 2) * 8 * 4 + 4
    )  # gate and up; q, k, v, the output twice; a sum
    kept = 10 * (layer + 2 * 8 * 4 + norm)
    logits = (
        10 * 1000 * 4 + 3 * 4 * 8000
    )  # a chunk's logits; gradients of hidden and of the embedding, twice while they add up
    expected = [4 * n, 4 * n, 8 * n, 0, kept, logits, 0.3 * (kept + logits), 0.3e9]
    assert list(found.values()) == pytest.approx(expected)
    deep = parse_config(raw | {"num_hidden_layers": 3}, "t")
    again = memory(
        deep, n, 10, "float32", example=5, recompute=True
    )  # three layers' inputs, one layer's insides
    assert again["activations"] == pytest.approx(kept + 10 * 3 * 8 * 4)
    copy = lambda **how: memory(deep, n, 10, "bfloat16", example=5, **how)[
        "weights in bfloat16, a working copy"
    ]
    assert copy() == pytest.approx(3 * copy(recompute=True), abs=3)
    half = memory(c, n, 10, "bfloat16", example=5)
    assert half["weights in bfloat16, a working copy"] == 2 * (n - 8000 * (1 if tied else 2))
    assert (
        half["activations"] < found["activations"] and half["AdamW's two moments, float32"] == 8 * n
    )
