"""On a CUDA card the same numbers as on the CPU: `pytest -m cuda tests`, or make check-gpu.

Products are in float32 without TF32 where nothing else is said. Each body also runs with "cpu" for
the card, so that it is known to run; what only a card can do is left out there.
"""

import copy
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from minibnf.attention import Blocks, Packed
from minibnf.data import pack, pair
from minibnf.files.config import parse_config
from minibnf.generate import generate
from minibnf.kernels import compile_by
from minibnf.lab.smallworld import write_base
from minibnf.losses import LOSSES
from minibnf.model import Transformer, fresh, save
from minibnf.step import run_batches
from minibnf.train import main
from tests.strategies import referred
from tests.test_train import arguments, logged
from tests.test_train import world  # noqa: F401, a fixture

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")

SHAPE = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=True,
    max_position_embeddings=256,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama 3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "mistral": {"sliding_window": 20},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": False},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma2": {"sliding_window": 20, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0,
               "final_logit_softcapping": 10.0},
    "gemma3_text": {"sliding_window": 20, "query_pre_attn_scalar": 16,
                    "sliding_window_pattern": 2},
}  # fmt: skip
GROUPS = [(30, [20, 25]), (9, []), (4, [40])]  # 128 tokens
EXAMPLES = [
    pair((5, 6, 7), (8, 9), (10,), 1),
    pair((5, 6, 7), (11, 12, 13), (14, 15), 2),
    pair((16, 17), (18, 19), (20, 21, 22), 3),
    pair(tuple(range(40, 60)), tuple(range(60, 90)), tuple(range(3, 43)), 4),
]


CUDA, COMPILED = (pytest.param(how, marks=pytest.mark.cuda) for how in ("cuda", "compiled"))


@pytest.fixture(params=["cpu", CUDA])
def card(request):
    """The device; "compiled": a CUDA card, on which the layers are compiled as the trainer does.

    What was compiled before is forgotten: Dynamo compiles a function 8 times and then gives up.
    """
    torch._dynamo.reset()
    compile_by("inductor" if request.param == "compiled" else None)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield "cpu" if request.param == "cpu" else "cuda"
    torch.set_float32_matmul_precision(before)
    compile_by(None)


compiled_too = pytest.mark.parametrize("card", ["cpu", CUDA, COMPILED], indirect=True)


def random_model(family: str, dtype=torch.float32) -> Transformer:
    """Weights large enough to matter, norms and biases too."""
    raw = SHAPE | {"model_type": family} | FAMILIES[family]
    model = Transformer(parse_config(raw, family), raw).init_weights(0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)
            else:
                noise = torch.empty_like(p).normal_(0, 0.2, generator=generator)
                p.add_(noise)
    return model.to(dtype)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference in terms of the exact one's."""
    exact = exact.double()
    return ((found.detach().cpu().double() - exact).norm() / exact.norm().clamp(min=1e-6)).item()


@torch.no_grad()
@compiled_too
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_cpus(card, family):
    """Against float64 on the CPU: three sequences, and a packed batch."""
    exact = random_model(family, torch.float64)
    model = copy.deepcopy(exact).float().to(card)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(97, (3, 40), generator=generator)
    assert error(model(tokens.to(card)), exact(tokens)) < 1e-5

    tokens = torch.randint(97, (1, 128), generator=generator)
    places = [
        i + start
        for prompt, responses in GROUPS
        for start, n in [(0, prompt), *((prompt, n) for n in responses)]
        for i in range(n)
    ]
    positions = torch.tensor([places])
    packed = model(tokens.to(card), positions.to(card), GROUPS)
    assert error(packed, exact(tokens, positions, GROUPS)) < 1e-5


# Each case is compiled anew, so not every combination: all windows and caps at width 64.
ATTENTION = [
    (64, dtype, window, cap)
    for dtype in (torch.float32, torch.bfloat16)
    for window in (None, 40)
    for cap in (None, 1.5)
] + [
    (width, dtype, window, cap)
    for width in (32, 128, 256)
    for dtype, window, cap in ((torch.float32, 40, 1.5), (torch.bfloat16, None, None))
]


@pytest.mark.parametrize("width, dtype, window, cap", ATTENTION)
def test_packed_attention_and_its_gradients_are_the_cpus(card, width, dtype, window, cap):
    """Blocks on the card against Packed in float64: output, dq, dk, dv.

    In bfloat16 the inputs are the same and the limit is a few of its roundings of 0.4%.
    """
    raw = SHAPE | {"model_type": "llama", "head_dim": width}
    c = replace(parse_config(raw, "t"), attention_softcap=cap)
    # 384 tokens; of 300 in one group prompt and responses attend by themselves on the CPU
    groups = [(3, [2, 4]), (100, [90, 0, 110]), (2, [1]), (4, []), (28, [40])]
    generator = torch.Generator().manual_seed(0)
    q, k, v, push = (
        torch.randn(1, heads, 384, width, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (4, 2, 2, 4)
    )
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = Packed(c, groups, window, torch.float64).attend(*exact)
    expected.backward(push.double())

    leaves = [x.to(card).requires_grad_(card == "cuda") for x in (q, k, v)]
    attend = Blocks(c, groups, window, torch.device(card)).attend
    found = (torch.compile(attend) if card == "cuda" else attend)(*leaves)
    limit = 1e-5 if dtype == torch.float32 else 0.02
    assert found.dtype == dtype and error(found, expected.detach()) < limit
    if card == "cuda":  # without a compiler flex_attention has no backward pass
        found.backward(push.to(card))
        for name, leaf, x in zip("qkv", leaves, exact, strict=True):
            assert error(leaf.grad, x.grad) < limit, f"d{name}"


def gradients(name: str, device: str) -> tuple[torch.Tensor, dict]:
    """The loss of EXAMPLES in two micro-batches, and every parameter's gradient."""
    model, loss = random_model("llama").to(device), LOSSES[name]
    tokens = sum(len(response) for e in EXAMPLES for response in e.responses)
    # near what the policy says, above and below, so that both branches of a loss are met
    logps = -4.6 + 3 * torch.sin(torch.arange(tokens, dtype=torch.float32))
    rows = referred(EXAMPLES, logps) if loss.needs_ref else EXAMPLES
    batches = pack(rows, [0, 1, 2, 3], 90)
    assert len(batches) == 2
    hyper = loss.hyper({"kl": 0.7} if "kl" in loss.defaults else {})
    value, _ = run_batches(model, batches, loss, hyper, torch.float32, backward=True)
    return value.cpu(), {name: p.grad for name, p in model.named_parameters()}


@compiled_too
@pytest.mark.parametrize("name", list(LOSSES))
def test_every_losses_gradients_are_the_cpus(card, name):
    value, expected = gradients(name, "cpu")
    found_value, found = gradients(name, card)
    torch.testing.assert_close(found_value, value, rtol=1e-4, atol=1e-6)
    for parameter, g in expected.items():
        assert error(found[parameter], g) < 1e-4, parameter


def test_greedy_generation_is_the_cpus(card):
    """Token for token, in float32: prompts that share a beginning, and some that do not."""
    model = random_model("llama")
    prompts = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 9], list(range(40)), [90], [3, 1, 4, 1, 5]]
    greedy = {"max_new_tokens": 24, "temperature": 0, "stop_ids": [2]}
    expected = generate(model, prompts, **greedy)
    assert generate(model.to(card), prompts, **greedy) == expected


def test_a_killed_and_resumed_run_goes_on(world, tmp_path, card):  # noqa: F811
    """Its losses are those of a run that was not killed.

    On a CPU to the bit. A card adds in any order, so there every step's loss is held to 1% and
    0.002, and the rates and the numbers of tokens, which are not computed there, exactly.
    """
    model = tmp_path / "model"
    write_base(model)  # with heads of 8, for which flex_attention does not compile
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    (model / "config.json").write_text(json.dumps(config))
    save(fresh(model, seed=0), model)
    more = ["--model", model, "--device", card, "--dtype", "float32", "--lr", "3e-4"]
    more += ["--epochs", "4", "--save-every", "3", "--max-tokens", "200"]
    assert main(arguments(world, tmp_path / "whole", *more)) == 0
    out = tmp_path / "killed"
    # a process of its own: a fork cannot use a card that this one has used
    words = [sys.executable, "-m", "minibnf.train", *arguments(world, out, *more)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        log = out / "metrics.jsonl"
        while not log.exists() or log.read_text().count("\n") < 5:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    assert not (out / "model").exists()
    assert main(["--resume", "--out", str(out)]) == 0
    whole, gone_on = logged(tmp_path / "whole"), logged(out)
    assert len(whole) == len(gone_on) == 16
    for a, b in zip(whole, gone_on, strict=True):
        for key in ("step", "epoch", "learning_rate", "num_tokens"):
            assert a[key] == b[key]
        close = {"rel": 0.01, "abs": 0.002} if card == "cuda" else {"rel": 0, "abs": 0}
        assert b["loss"] == pytest.approx(a["loss"], **close)
    assert whole[-1]["loss"] < whole[0]["loss"]
