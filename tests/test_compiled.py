"""What a GPU compiles, compared on a CPU with what is written.

By aot_eager, which makes the same graphs and runs them with PyTorch's own kernels, and by
inductor where there is a C++ compiler.
"""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask

from minibnf import kernels
from minibnf.attention import BLOCK, _rule, block_mask
from minibnf.data import pack, pair
from minibnf.files.config import parse_config
from minibnf.logprob import token_logps
from minibnf.losses import LOSSES
from minibnf.model import Transformer

from minibnf.step import batch_logps, run_batches
from tests.strategies import FEW, referred

LAYOUTS = st.lists(
    st.tuples(st.integers(1, 300), st.lists(st.integers(0, 200), max_size=3)),
    min_size=1,
    max_size=5,
)


def dense(count, indices):
    """(blocks, blocks): whether a row names a column among its first `count` indices."""
    named = torch.arange(count.shape[-1]) < count[0, 0, :, None]
    return torch.zeros_like(named).scatter_(1, indices[0, 0].long(), named)


@FEW
@given(groups=LAYOUTS, window=st.sampled_from([None, 1, 70, 400]))
def test_the_block_mask_is_pytorchs_own(groups, window):
    """Blocks in a window may be asked token by token, in vain: what they see stays the same."""
    groups = [*groups, (-sum(p + sum(ns) for p, ns in groups) % BLOCK, [])]
    T = sum(p + sum(ns) for p, ns in groups)
    ours = block_mask(groups, window, "cpu")
    theirs = create_block_mask(_rule(groups, window, "cpu"), None, None, T, T, device="cpu")
    some = dense(ours.kv_num_blocks, ours.kv_indices)
    whole = dense(ours.full_kv_num_blocks, ours.full_kv_indices)
    expected = dense(theirs.kv_num_blocks, theirs.kv_indices)
    expected_whole = dense(theirs.full_kv_num_blocks, theirs.full_kv_indices)
    assert not (some & whole).any() and not (whole & ~expected_whole).any()
    assert not ((expected | expected_whole) & ~(some | whole)).any()
    if window is None:
        assert torch.equal(some, expected) and torch.equal(whole, expected_whole)


@pytest.fixture
def compiled_by(monkeypatch):
    """Compile by a backend, counting graphs; flex_attention may differentiate on a CPU."""
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)

    def start(backend: str):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        kernels.compile_by(counter)
        return counter

    yield start
    kernels.compile_by(None)
    torch._dynamo.reset()


RAW = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 40, "vocab_size": 50,
    "max_position_embeddings": 1000, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": True,
}  # fmt: skip


def examples(longest: int):
    """Three pairs, the first of which has responses of about so many tokens."""
    words = list(range(4, 50)) * 20
    return [
        pair(tuple(words[:9]), tuple(words[9 : 9 + longest]), tuple(words[20 : 17 + longest]), 1),
        pair((5, 6, 7), (11, 12, 13), (14, 15), 2),
        pair((16, 17), (18, 19), (20, 21, 22), 3),
    ]


def step(model, name: str, longest: int):
    """A step's loss, sums and gradients."""
    rows, loss = examples(longest), LOSSES[name]
    hyper = loss.hyper({"kl": 0.0} if "kl" in loss.defaults else {})
    batches = pack(referred(rows) if loss.needs_ref else rows, [0, 1, 2], 2048)
    model.zero_grad()
    found = run_batches(model, batches, loss, hyper, torch.float32, backward=True)
    return [*found, *(p.grad.clone() for p in model.parameters())]


GEMMA = RAW | {
    "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 20,
    "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("name, raw", [("bnf", RAW), ("dpo", GEMMA)])
def test_a_compiled_step_is_the_step(compiled_by, name, raw):
    """Plain layers; layers with a window and without, soft caps, and a loss that couples."""
    model = Transformer(parse_config(raw, "t"), raw).init_weights(0)
    expected = step(model, name, 30)
    compiled_by("aot_eager")
    for found, wanted in zip(step(model, name, 30), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_lengths_make_no_new_graphs(compiled_by):
    """All layers share their graphs, and after the first two steps there are enough of them."""
    model = Transformer(parse_config(RAW, "t"), RAW).init_weights(0)
    graphs = compiled_by("eager")
    step(model, "bnf", 30)
    step(model, "bnf", 150)
    enough = graphs.frame_count
    for longest in (40, 200, 90, 333):
        step(model, "bnf", longest)
    assert graphs.frame_count == enough <= 4


def test_a_compiler_that_fails_is_named_and_left(compiled_by):
    model = Transformer(parse_config(RAW, "t"), RAW).init_weights(0)
    expected = step(model, "bnf", 30)

    def broken(graph, inputs):
        raise OSError("no space for kernels\nand more lines")

    said = kernels.compile_by(broken, lambda: step(model, "bnf", 30))
    assert "OSError: no space for kernels" in said and "\n" not in said
    assert not kernels.compiling()
    for found, wanted in zip(step(model, "bnf", 30), expected, strict=True):
        assert torch.equal(found, wanted)


def test_the_reference_runs_trainings_graph(compiled_by):
    """Under no_grad another graph would be compiled, which may round otherwise."""
    model = Transformer(parse_config(RAW, "t"), RAW).init_weights(0)
    graphs = compiled_by("eager")
    step(model, "bnf", 30)
    enough = graphs.frame_count
    with torch.no_grad():
        for batch in pack(examples(30), [0, 1, 2], 2048):
            batch_logps(model, batch, LOSSES["bnf"], torch.float32, training=True)
    assert graphs.frame_count == enough


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler here")
def test_the_sweeps_kernels_by_inductor(compiled_by):
    hidden = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    unembed = torch.randn(60, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.arange(40)
    found = {}
    for backend in (None, "inductor"):
        kernels.compile_by(backend)
        logps = token_logps(hidden, unembed, targets, chunk=16, softcap=2.0)
        found[backend] = logps, *torch.autograd.grad(logps.square().sum(), (hidden, unembed))
    for written, compiled in zip(found[None], found["inductor"], strict=True):
        torch.testing.assert_close(compiled, written, rtol=1e-5, atol=1e-6)
