"""A step never waits for the device: reading a number on the host would leave a GPU idle.

Without a GPU the step runs on PyTorch's meta device, whose tensors have a shape and no numbers:
most of what would read one is an error there. Copies and new tensors that would wait are made
errors here. The rest only the last test can see, on CUDA.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minibnf import attention
from minibnf import model as model_room
from minibnf.data import mismatched, pack, pair
from minibnf.generate import generate
from minibnf.losses import LOSSES
from minibnf.model import load
from minibnf.step import kl_estimate, metrics, run_batches
from tests.strategies import referred


EXAMPLES = [
    pair((5, 6, 7), (8, 9), (10,), 1),
    pair((5, 6, 7), (11, 12, 13), (14, 15), 2),
    pair((16, 17), (18, 19), (20, 21, 22), 3),
]


class NoBlockingCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            source = args[func._schema.name == "aten::copy_"]
            blocks = not ((kwargs or {}).get("non_blocking") or args[2:3] == (True,))
            blocks = blocks or not getattr(source, "pinned", False)
            if blocks and source.dim() and {source.device.type, out.device.type} == {"cpu", "meta"}:
                raise RuntimeError(f"waits for a copy of {tuple(source.shape)}")
        return out


def one_step(model, name: str) -> torch.Tensor:
    loss = LOSSES[name]
    batches = pack(referred(EXAMPLES) if loss.needs_ref else EXAMPLES, [0, 1, 2], 8)
    assert len(batches) == 2
    hyper = loss.hyper({"kl": 0.0} if "kl" in loss.defaults else {})
    if "kl" in hyper:
        others, _ = mismatched(EXAMPLES, 100, "data")
        packed = pack(referred(others), [0, 1, 2], 8)
        hyper["kl"] = kl_estimate(model, packed, loss, torch.bfloat16)
    value, sums = run_batches(model, batches, loss, hyper, torch.bfloat16, backward=True)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return torch.stack([value, norm, *metrics(batches, sums, 0.5).values()])


@pytest.fixture
def without_a_driver(monkeypatch):
    """Stands in for what needs a driver: pinned memory."""
    real = torch.tensor

    def pin_memory(x):
        x = x.view_as(x)
        x.pinned = True
        return x

    def tensor(data, *, device=None, **options):
        if torch.device(device or "cpu").type == "meta":
            raise RuntimeError("waits for a copy of what the host holds")
        return real(data, device=device, **options)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch, "tensor", tensor)


@pytest.fixture(params=["pieces", "blocks"])
def attends(request, monkeypatch):
    """In pieces; or, as where it is compiled, by blocks, flex_attention being left out."""
    if request.param == "blocks":
        for room in (attention, model_room):
            monkeypatch.setattr(room, "compiling", lambda: True)
        monkeypatch.setattr(attention, "flex_attention", lambda q, k, v, *_: q + k.sum() + v.sum())


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_step_never_waits_for_the_device(without_a_driver, attends, name):
    model = load("weights/tiny").to("meta")
    with NoBlockingCopies():
        assert one_step(model, name).shape == (2 + 2 + 4 * LOSSES[name].needs_ref,)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("how", [{"temperature": 0}, {"top_p": 0.9}, {"top_k": 3}])
def test_generation_waits_once_per_token(without_a_driver, monkeypatch, how):
    """For the token itself, which may end its text; reading the prompts waits for nothing."""
    model, waits = load("weights/tiny").to("meta"), []

    def tolist(x):
        waits.append(len(x))
        return [2 if row and len(waits) == 2 else 1 for row in range(len(x))]  # all but one end

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    prompts = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 9], [5, 6]]
    with NoBlockingCopies():
        out = generate(model, prompts, max_new_tokens=4, stop_ids=[2], **how)
    assert sorted(out) == [[1, 1, 1, 1], [1, 2], [1, 2], [1, 2]] and waits == [4, 4, 1, 1]


def test_what_waits_is_noticed(without_a_driver):
    x, late = torch.ones(3, device="meta"), {"device": "meta", "non_blocking": True}
    waits = [
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: bool(x.any()),
        lambda: torch.tensor([1, 2], device="meta"),
        lambda: torch.ones(3).to("meta"),
        lambda: torch.ones(3).to(**late),
        lambda: torch.ones(3).pin_memory().to("meta"),
    ]
    for wait in waits:
        with NoBlockingCopies(), pytest.raises((RuntimeError, NotImplementedError)):
            wait()
    with NoBlockingCopies():
        torch.ones(3).pin_memory().to(**late)


@pytest.mark.cuda
@pytest.mark.parametrize("name", list(LOSSES))
def test_a_step_never_waits_for_a_real_device(name):
    model = load("weights/tiny").to("cuda")
    optim = torch.optim.AdamW(model.parameters(), fused=True)
    one_step(model, name)  # compiles
    optim.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        numbers = one_step(model, name).to("cpu", non_blocking=True)
        optim.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert numbers.isfinite().all()
