"""The Transformer's pieces against definitions, checkpoints out and in."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minibnf.attention import Blocks, Causal, Packed
from minibnf.files import safetensors
from minibnf.files.config import Rope, announce_ignored, parse_config
from minibnf.kernels import rotate
from minibnf.model import fresh, load, rotary, save

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 37,
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "max_position_embeddings": 64, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save(fresh(tmp_path, seed=0), tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------------------- pieces


@given(m=st.integers(0, 40), n=st.integers(0, 40), shift=st.integers(0, 40))
def test_rotary_scores_depend_on_distance_only(m, n, shift):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=g, dtype=torch.float64)

    def score(m, n):
        places = torch.tensor([m, n])[:, None, None, None]
        cos, sin = rotary(places, 8, Rope(1e4), torch.float64)
        return (rotate(q, cos[0], sin[0]) * rotate(k, cos[1], sin[1])).sum()

    torch.testing.assert_close(score(m + shift, n + shift), score(m, n), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("layout", [[(9, [])], [(3, [2, 4]), (2, [1])], [(4, [5])]])
def test_attention_is_its_definition_token_by_token(window, cap, layout):
    """Loops in float64: who sees whom, the scale, the soft cap, which keys a query head shares."""
    raw = CONFIG | {
        "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": cap, "sliding_window": 4,
    }  # fmt: skip
    c = parse_config({k: v for k, v in raw.items() if k != "rope_theta"}, "t")
    assert c.attention_softcap == cap and c.query_scale == 5**-0.5
    places = [  # (group, part: 0 the prompt, position) of each token
        (group, part, i + prompt * (part > 0))
        for group, (prompt, responses) in enumerate(layout)
        for part, n in enumerate([prompt, *responses])
        for i in range(n)
    ]
    S, g = len(places), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, S, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    found = Packed(c, layout, window, torch.float64).attend(q, k, v)
    if layout == [(9, [])]:  # a prompt alone is a causal sequence
        causal = Causal(c, S, window, torch.float64, "cpu").attend(q, k, v)
        torch.testing.assert_close(causal, found, rtol=1e-9, atol=1e-12)
    for head in range(4):
        for i, (group, part, position) in enumerate(places):
            seen = [
                j for j, (other, its_part, its_position) in enumerate(places[: i + 1])
                if other == group and its_part in (0, part)
                and (window is None or position - its_position < window)
            ]  # fmt: skip
            scores = torch.stack([q[0, head, i] @ k[0, head // 2, j] / 5**0.5 for j in seen])
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            expected = scores.softmax(0) @ v[0, head // 2, seen]
            torch.testing.assert_close(found[0, head, i], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 3, 200])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_the_gpus_blocks_see_what_the_cpus_pieces_see(window, cap):
    """flex_attention without a GPU against pieces; some groups are long enough to be in several."""
    raw = CONFIG | {"num_attention_heads": 4, "num_key_value_heads": 2}
    c = replace(parse_config(raw, "t"), attention_softcap=cap)
    layout = [(3, [2, 4]), (100, [90, 0, 110]), (2, [1]), (40, []), (3, [200, 300]), (39, [130])]
    S, g = sum(p + sum(ns) for p, ns in layout), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, S, c.head_dim, generator=g) for heads in (4, 2, 2))
    found = Blocks(c, layout, window, "cpu").attend(q, k, v)
    expected = Packed(c, layout, window, torch.float32).attend(q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_llama3_slows_long_waves_and_keeps_short_ones():
    """By hand, d = 4: of waves of 2π and 2π 1e4 positions the first is kept, the second slowed.

    The context is 1000, the factors 1 and 4.
    """
    position = torch.tensor([[7.0]], dtype=torch.float64)
    cos, sin = rotary(position, 4, Rope(1e8, (8.0, 1.0, 4.0, 1000)), torch.float64)
    angles = torch.tensor([7.0, 7e-4 / 8] * 2, dtype=torch.float64)
    torch.testing.assert_close(cos[0, 0], angles.cos(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sin[0, 0].abs(), angles.sin(), rtol=1e-9, atol=0)
    cos, _ = rotary(position, 4, Rope(1e8, (8.0, 1.0, 4.0, 2 * math.pi * 2e4)), torch.float64)
    # context / wave = 2: a third of the way from slowed to kept
    assert cos[0, 0, 1].acos().item() == pytest.approx(7e-4 * (1 / 3 + 2 / 3 / 8), rel=1e-6)


def test_a_later_token_changes_nothing_before_it(tiny):
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    changed = tokens.clone()
    changed[0, 3] = 9
    a, b = tiny(tokens), tiny(changed)
    torch.testing.assert_close(a[0, :3], b[0, :3], rtol=0, atol=0)
    assert not torch.allclose(a[0, 3:], b[0, 3:])


# ------------------------------------------------------------------------------------ checkpoints


def test_what_is_saved_is_loaded_and_a_tied_weight_is_saved_once(directory):
    model = load(directory)
    with safe_open(directory / "model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
    assert names == {name for name, _ in model.named_parameters()} and "lm_head.weight" not in names
    assert "model.layers.1.self_attn.q_proj.weight" in names
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(tokens), fresh(directory, seed=0)(tokens), rtol=0, atol=0)
    assert load(directory, dtype=torch.bfloat16).unembed.dtype == torch.bfloat16
    modes = [(directory / name).stat().st_mode for name in ("config.json", "model.safetensors")]
    assert modes[0] == modes[1]  # readable by the same people


def test_an_untied_model_in_shards(directory, monkeypatch):
    (directory / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": False}))
    model = fresh(directory, seed=1)
    (directory / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(safetensors, "SHARD_BYTES", 5000)
    save(model, directory)
    files = sorted(f.name for f in directory.glob("model*"))
    assert len(files) > 3 and "model.safetensors" not in files
    assert "model.safetensors.index.json" in files
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(load(directory)(tokens), model(tokens), rtol=0, atol=0)
    monkeypatch.setattr(safetensors, "SHARD_BYTES", 10**9)
    save(model, directory)  # the stale shards go, other files stay
    assert [f.name for f in sorted(directory.glob("model*"))] == ["model.safetensors"]
    assert (directory / "tokenizer.json").exists()
    torch.testing.assert_close(load(directory)(tokens), model(tokens), rtol=0, atol=0)


def change_tensors(directory, change):
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_unembedding_stored_twice_must_agree(directory):
    head = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(directory, lambda s: s.update({"lm_head.weight": head}))
    load(directory)
    change_tensors(directory, lambda s: s["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load(directory)


def test_rotary_frequencies_in_old_files_are_passed_over_and_nothing_else_is(directory):
    tokens = torch.tensor([[1, 2, 3]])
    before = load(directory)(tokens)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(directory, lambda s: s.update({name: torch.full((4,), 7.0)}))
    torch.testing.assert_close(load(directory)(tokens), before, rtol=0, atol=0)
    change_tensors(directory, lambda s: s.update({"model.layers.0.inv_freq": torch.zeros(4)}))
    with pytest.raises(ValueError, match=r"tensor 'model\.layers\.0\.inv_freq' is in the files"):
        load(directory)


def test_fields_of_another_family_are_ignored_and_named(directory, capsys):
    fields = {"attn_logit_softcapping": 1.0, "layer_types": ["sliding_attention"], "use_mrope": 1}
    tokens = torch.tensor([[1, 2, 3]])
    before = load(directory)(tokens)
    (directory / "config.json").write_text(json.dumps(CONFIG | fields))
    model = load(directory)
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)
    assert capsys.readouterr() == ("", "")
    announce_ignored(directory, model.raw)
    line = (
        f"{directory / 'config.json'}: fields that a model of llama does not read are ignored: "
        "'attn_logit_softcapping', 'layer_types', 'use_mrope'\n"
    )
    assert capsys.readouterr() == ("", line)


def test_a_window_that_is_used_and_not_named_is_transformers_own():
    raw = CONFIG | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
    assert [layer.window for layer in parse_config(raw, "t").layers] == [None, 4096]


LLAMA3 = {
    "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "beta": 1
}  # fmt: skip


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_act": "gelu"}, "field 'hidden_act' = 'gelu' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary positions .*linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rotary positions .*yarn"),
        ({"sliding_window": 8}, "field 'sliding_window' = 8 is not supported for llama"),
        ({"model_type": "phi3"}, "field 'model_type' = 'phi3'"),
        ({"model_type": "gemma2", "hidden_activation": "relu"}, "'hidden_activation' = 'relu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "field 'quantization_config' = .*fp8"),
        ({"is_causal": False}, "field 'is_causal' = False is not supported"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "must name 2 times"),
        ({"rope_scaling": LLAMA3}, "llama3 with the fields .*, original_max_pos"),
        ({"hidden_size": 24.5}, "field 'hidden_size' must be a whole number .*, not 24.5"),
        ({"num_key_value_heads": 2}, "must be a multiple"),
    ],
)
def test_a_config_that_would_compute_something_else_is_refused(directory, fields, message):
    (directory / "config.json").write_text(json.dumps(CONFIG | fields))
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_a_config_that_is_not_there_or_broken(directory, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no config\.json"):
        load(tmp_path / "empty")
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(directory)


def test_an_interrupted_save_leaves_what_was_there(directory, monkeypatch):
    before = (directory / "model.safetensors").read_bytes()
    monkeypatch.setattr(safetensors, "save_file", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(fresh(directory, seed=9), directory)
    monkeypatch.undo()
    assert not list(directory.glob(".*"))
    assert (directory / "model.safetensors").read_bytes() == before
    assert sorted(f.name for f in directory.iterdir()) == ["config.json", "model.safetensors"]
