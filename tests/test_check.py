"""What check says of a checkpoint, what it finds wrong, and its estimate of memory."""

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
    assert main([str(directory.parent), "--values"]) == 0  # as of a run's folder
    said = capsys.readouterr().out
    model = load(directory)
    n = sum(p.numel() for p in model.parameters())
    embeddings = model.unembed.numel()
    for part in (
        f"model       {directory}: llama",
        f"{n:,}, {embeddings:,} of them embeddings, tied",
        "float32, 3.5 MB in 1 file\n",
        "every number finite",
        "4 of width 128, 4 heads of 32 on 2 of keys and values, MLP 384",
        "256 tokens\n",
        "672, 672 of them in tokenizer.model",
        "a template; a turn ends at <|end|> (2)",
        "MB to train on a CPU at --max-tokens 2048",
        f"  weights, float32                              {4 * n / 1e6:8.2f}{4 * n / 1e6:10.2f}\n",
    ):
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
    assert main([str(directory), "--max-tokens", "100"]) == 0
    said = capsys.readouterr().out
    for part in (
        ": mistral",
        f"{2 * model.unembed.numel():,} of them embeddings, not tied",
        "bfloat16 and float32",
        "in 4 files",
        "256 tokens; 4 layers see 64 tokens back",
        "no template",
        "--max-tokens 100",
    ):
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


def shorten(file):
    file.write_bytes(file.read_bytes()[:-9])


NORM = "model.norm.weight"
QUANTISED, EXTRA = {NORM: torch.zeros(128).to(torch.int8)}, {"model.extra": torch.zeros(1)}
UNTIED = {"lm_head.weight": torch.zeros(672, 128)}
OTHER_SIZE = "'model.embed_tokens.weight' is (672, 128), but config.json says (600, 128)"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (shutil.rmtree, "is no folder"),
        (lambda d: shorten(d / "model.safetensors"), "not a readable"),
        (lambda d: (d / "tokenizer.model").unlink(), "neither tokenizer.json nor tokenizer.model"),
        (lambda d: change(d, vocab_size=600), OTHER_SIZE),
        (lambda d: edit(d, lambda s: s.pop(NORM)), f"tensor '{NORM}' is missing (1 of 38 are)"),
        (
            lambda d: edit(d, lambda s: s.update(EXTRA)),
            "tensor 'model.extra' is in the files but not in the model",
        ),
        (lambda d: edit(d, lambda s: s.update(QUANTISED)), f"tensor '{NORM}' is I8; quantised"),
        (lambda d: edit(d, lambda s: s.update(UNTIED)), "lm_head.weight differs"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_1(directory, capsys, spoil, message):
    spoil(directory)
    assert main([str(directory)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ")
    assert said.err.count("\n") == 1 and message in said.err


def test_a_number_that_is_not_finite_is_found_where_values_are_asked_for(directory, capsys):
    edit(directory, lambda s: s["model.layers.2.mlp.up_proj.weight"][3, 4:5].fill_(torch.inf))
    assert main([str(directory)]) == 0
    assert main([str(directory), "--values"]) == 1
    named = "model.safetensors: tensor 'model.layers.2.mlp.up_proj.weight' holds a number"
    assert named in capsys.readouterr().err


def test_the_weights_are_not_read(directory, monkeypatch, capsys):
    monkeypatch.setattr("minibnf.check.tensors_of", None)
    monkeypatch.setattr("minibnf.model.tensors_of", None)
    assert main([str(directory)]) == 0


# ----------------------------------------------------------------------------------------- memory


def kept(c, dtype, groups: int) -> int:
    """Bytes that autograd keeps of so many packed pairs of 40 tokens, parameters aside."""
    model, sizes, storages = Transformer(c, {}).init_weights(0), (20, 12, 8), {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    positions = torch.tensor([*range(32), *range(20, 28)] * groups)

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    tokens = torch.randint(c.vocab_size, (1, groups * 40))
    layout = [(sizes[0], list(sizes[1:]))] * groups
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(tokens, positions[None], layout, dtype=dtype, head=lambda x, _: x)
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype, width", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_autograd_keeps_the_estimate_or_up_to_a_third_more(family, dtype, width):
    raw = {
        "model_type": family, "vocab_size": 50, "hidden_size": 96, "intermediate_size": 200,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if family == "gemma2":  # without the soft cap, whose scores are left out
        raw |= {"query_pre_attn_scalar": 16, "sliding_window": 16, "attn_logit_softcapping": None}
    two = parse_config(raw | {"num_hidden_layers": 2}, "raw")
    four = parse_config(raw | {"num_hidden_layers": 4}, "raw")
    # Two layers more in three groups more: what a model keeps once, and copies of weights, cancel.
    more = kept(four, dtype, 6) - kept(two, dtype, 6)
    each = (more - kept(four, dtype, 3) + kept(two, dtype, 3)) / (2 * 3 * 40)
    assert 0.99 < each / layer_bytes(two, width) < 1.34


def test_memory_by_hand():
    """One layer of width 8, one head, MLP 16, a vocabulary of 1000; 10 tokens."""
    raw = {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    c, n = parse_config(raw, "t"), 4 * 64 + 3 * 128 + 3 * 8 + 8000
    layer, logits = 4 * (6 * 8 + 2 * 16 + 5 * 8), 4 * 10 * 1000 + 12 * 8000
    by_hand = [4 * n, 4 * n, 8 * n, 0, 10 * layer, logits]
    assert list(memory(c, n, 10, "float32").values()) == by_hand
    half = memory(c, n, 10, "bfloat16")
    assert half["weights in bfloat16, a working copy"] == 2 * (n - 8000)
    deep = parse_config(raw | {"num_hidden_layers": 3}, "t")
    again = memory(deep, n, 10, "float32", recompute=True)  # three inputs, one layer's insides
    assert again["activations"] == 10 * (layer + 3 * 8 * 4)
