"""Token log-probabilities from hidden states, chunk by chunk: what touches the vocabulary.

Shapes: N tokens, D width, V vocabulary, C tokens a chunk. A (C, V) buffer of logits is made, used
and overwritten chunk by chunk; nothing of size (N, V) ever exists.

    sweep         log-probabilities, loss, dhidden and dunembed in a single pass, for a trainer
    token_logps   log-probabilities with a backward by hand, for any loss in plain torch (the logits
                  are made again in backward)

The naive expression that both are tested against:

    logits = hidden @ unembed.T                                      # (N, V)
    logps = logits.log_softmax(-1).gather(1, targets[:, None])       # (N, 1)

Derivation. With z = hidden @ unembed.T and an upstream g_i = dL/dlogps_i,
    dlogits_iv = g_i (1[v = y_i] - p_iv)
    dhidden = dlogits @ unembed
    dunembed = dlogits.T @ hidden
A soft cap z = κ tanh(x/κ) multiplies dlogits by dz/dx = 1 - (z/κ)².
"""

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minibnf.kernels import product, weight_gradient

CHUNK_LOGITS = 2**24  # of a chunk: 64 MiB in float32
# of a chunk that must not be cut; one of more is read twice
ROW_LOGITS = {"cpu": 2**26, "cuda": 2**28}


def token_logps(
    hidden, unembed, targets, *, chunk: int | None = None, softcap: float | None = None
) -> Tensor:
    """(N,) float32 (float64 for float64 input): log softmax(hidden @ unembed.T)[targets], in nats.

    hidden (N, D), unembed (V, D), targets (N,) int64 in 0..V-1. chunk: tokens at a time, by default
    what keeps a chunk's logits near 64 MiB. softcap: logits are softcap * tanh(logits / softcap)
    (Gemma-2). Where hidden is bfloat16, products are taken in bfloat16 and everything after them in
    float32; dunembed comes in unembed's own dtype, a master's float32. Differentiable in hidden and
    unembed. Raises ValueError for shapes or targets that do not fit.
    """
    _check(hidden, unembed, targets, chunk, softcap)
    return _TokenLogps.apply(hidden, unembed, targets, chunk, softcap)


def sweep(
    hidden: Tensor,
    unembed: Tensor,
    targets: Tensor,
    chunks: list[slice],
    judge: Callable[[int, Tensor], tuple[Tensor, Tensor]] | None = None,
    *,
    most: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A loss and its gradients in one pass over the vocabulary: what fine-tuning costs.

    hidden (N, D), unembed (V, D), targets (N,) as above. chunks: slices of the N tokens, one after
    another, each of which the loss can judge by itself (cuts). judge(k, logps of chunk k) -> the
    chunk's share of the loss, a scalar, and its dlogps; None: there is no loss, only logps.
    Returns the loss, differentiable in hidden and unembed, and logps (N,), detached.

    A chunk's dlogps is known once its own logps are, so dlogits is made while the chunk's
    probabilities are still there: backward makes no product with the vocabulary again. A chunk of
    more than `most` tokens (by default ROW_LOGITS of logits) is read twice: for its logps, then for
    its gradients. The gradients are those of the loss as it is returned: call backward on it, not
    on a multiple of it.
    """
    _check(hidden, unembed, targets, most, softcap)
    if not torch.is_grad_enabled():
        # inside a Function a parameter would still ask for its gradient
        hidden, unembed = hidden.detach(), unembed.detach()
    most = most or max(1, ROW_LOGITS[_kind(unembed)] // len(unembed))
    return _Sweep.apply(hidden, unembed, targets, chunks, judge, most, softcap)


def cuts(sizes: list[int] | None, N: int, V: int, chunk: int | None = None) -> list[slice]:
    """The N tokens in chunks of nearly one size, about CHUNK_LOGITS of logits (or `chunk` tokens).

    A few tokens at the end would cost as much as many. sizes: the tokens of each row, where a row
    must not be cut; then a chunk ends with the row that is nearest to its share.
    """
    most = chunk or max(16, CHUNK_LOGITS // V)
    count = max(1, -(-N // most))  # of chunks
    if sizes is None:
        C = max(1, -(-N // count))
        return [slice(i, min(i + C, N)) for i in range(0, N, C)]
    ends, at = [], 0
    for size in sizes:
        at += size
        ends.append(at)
    # each k-th share of N ends at the nearest end of a row
    chosen = {min(ends, key=lambda end: abs(end - k * N / count)) for k in range(1, count + 1)}
    stops = sorted(chosen)
    return [slice(a, b) for a, b in zip([0, *stops], stops, strict=False)]


class _Parts(NamedTuple):
    """Of a chunk of C tokens, what its softmax is made of (see _softmax_parts)."""

    e: Tensor  # (C, V), exponentiated logits, the target's entry set to 0
    rest: Tensor  # (C,), the sum of e
    total: Tensor  # (C,), the sum with the target: Σ
    logps: Tensor  # (C,), the target's log-probability
    slope: Tensor | None  # (C, V), dz/dx of a soft cap


def _buffer(hidden, unembed, slices: list[slice]) -> Tensor:
    """Room for the logits of the longest slice.

    Fresh memory costs more than the work on it (the system hands it out page by page), so it is
    made once and overwritten by each slice.
    """
    return _float_like(hidden, max((i.stop - i.start for i in slices), default=0), len(unembed))


def _read(buffer, hidden, unembed, targets, i: slice, softcap) -> _Parts:
    """The parts of the tokens in slice i, in the buffer.

    The product, here and in _accumulate, goes by blocks of the vocabulary that stay in the
    processor's cache.
    """
    z = buffer[: i.stop - i.start]
    for v in _blocks(unembed):
        z[:, v] = product(hidden[i], unembed[v])
    return _softmax_parts(z, targets[i], softcap)


def _blocks(unembed) -> list[slice]:
    """The vocabulary in blocks of about 8 MiB, on a CPU; a GPU takes it whole."""
    V, D = unembed.shape
    size = max(256, 2**21 // D) if unembed.device.type == "cpu" else V
    return [slice(v, v + size) for v in range(0, V, size)]


def _kind(x: Tensor) -> str:
    return "cpu" if x.device.type == "cpu" else "cuda"


def _softmax_parts(z, targets, softcap) -> _Parts:
    """Of a chunk's logits z (C, V), which are overwritten.

    The target is kept out of the sum because 1 - p = rest/Σ and, where the target is the largest
    logit, log p = -log1p(rest) then keep their relative accuracy as p -> 1, which the odds in BNF's
    weight live on.
    """
    slope = None
    if softcap is not None:
        z = z.div_(softcap).tanh_()
        slope = 1 - z.square()
        z = z.mul_(softcap)
    y = targets[:, None]
    z_max = z.amax(1, keepdim=True)
    z_y = z.gather(1, y) - z_max
    e = z.sub_(z_max).exp_()
    e.scatter_(1, y, 0.0)
    rest, z_y = e.sum(1), z_y[:, 0]
    total = rest + z_y.exp()
    logps = torch.where(z_y == 0, -torch.log1p(rest), z_y - total.log())
    return _Parts(e, rest, total, logps, slope)


def _dlogits_in_place(parts: _Parts, targets, g):
    """parts.e turned into dlogits (C, V): -g p_v, and at the target g (1 - p_y) = g rest/Σ."""
    scale = g / parts.total
    dlogits = parts.e.mul_(-scale[:, None])
    dlogits.scatter_(1, targets[:, None], (scale * parts.rest)[:, None])
    return dlogits if parts.slope is None else dlogits.mul_(parts.slope)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, unembed, targets, chunk, softcap):
        ctx.save_for_backward(hidden, unembed, targets)
        ctx.softcap, ctx.chunks = softcap, cuts(None, len(targets), len(unembed), chunk)
        logps, u = _float_like(hidden, len(targets)), unembed.to(hidden.dtype)
        buffer = _buffer(hidden, unembed, ctx.chunks)
        for i in ctx.chunks:
            logps[i] = _read(buffer, hidden, u, targets, i, softcap).logps
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps):
        hidden, unembed, targets = ctx.saved_tensors
        dhidden, dunembed = _empty_gradients(hidden, unembed, ctx.needs_input_grad)
        u, buffer = unembed.to(hidden.dtype), _buffer(hidden, unembed, ctx.chunks)
        for i in ctx.chunks:
            parts = _read(buffer, hidden, u, targets, i, ctx.softcap)
            dlogits = _dlogits_in_place(parts, targets[i], dlogps[i])
            _accumulate(dhidden, dunembed, i, dlogits, hidden[i], u)
        return dhidden, dunembed, None, None, None


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, unembed, targets, chunks, judge, most, softcap):
        wanted = (False, False) if judge is None else ctx.needs_input_grad
        dhidden, dunembed = _empty_gradients(hidden, unembed, wanted)
        pieces = [_pieces(chunk, most, len(unembed)) for chunk in chunks]
        buffer = _buffer(hidden, unembed, list(chain.from_iterable(pieces)))
        logps, u = _float_like(hidden, len(targets)), unembed.to(hidden.dtype)
        loss = logps.new_zeros(())
        for k, chunk in enumerate(chunks):
            for i in pieces[k]:
                parts = _read(buffer, hidden, u, targets, i, softcap)
                logps[i] = parts.logps
            if judge is None:
                continue
            value, dlogps = judge(k, logps[chunk])
            loss += value
            for i in pieces[k] if any(wanted[:2]) else []:
                if len(pieces[k]) > 1:  # the buffer holds the last piece: each is read again
                    parts = _read(buffer, hidden, u, targets, i, softcap)
                own = dlogps[i.start - chunk.start : i.stop - chunk.start]
                dlogits = _dlogits_in_place(parts, targets[i], own)
                _accumulate(dhidden, dunembed, i, dlogits, hidden[i], u)
        ctx.save_for_backward(dhidden, dunembed)
        ctx.mark_non_differentiable(logps)
        return loss, logps

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        # elsewhere looking would wait for the device
        if dloss.device.type == "cpu" and dloss != 1:
            raise RuntimeError("the gradients of a sweep are those of its loss, not of a multiple")
        return *ctx.saved_tensors, None, None, None, None, None


def _pieces(chunk: slice, most: int, V: int) -> list[slice]:
    """A chunk whole, or, where it has more than `most` tokens, in pieces of CHUNK_LOGITS."""
    N = chunk.stop - chunk.start
    if N <= most:
        return [chunk]
    parts = cuts(None, N, V, min(most, max(16, CHUNK_LOGITS // V)))
    return [slice(chunk.start + i.start, chunk.start + i.stop) for i in parts]


def _empty_gradients(hidden, unembed, needed):
    """dhidden in hidden's dtype, since each row is written once; dunembed in float32 or wider.

    Chunks add up in dunembed, and autograd casts it to unembed's dtype at the end.
    """
    dhidden = torch.empty_like(hidden) if needed[0] else None
    dunembed = _float_like(unembed, *unembed.shape).zero_() if needed[1] else None
    return dhidden, dunembed


def _accumulate(dhidden, dunembed, i, dlogits, hidden, unembed):
    dh = 0.0
    for v in _blocks(unembed):
        d = dlogits[:, v].to(hidden.dtype)
        if dhidden is not None:
            dh += product(d, unembed[v].t()).to(dlogits.dtype)
        if dunembed is not None:
            dunembed[v] += weight_gradient(d, hidden)
    if dhidden is not None:
        dhidden[i] = dh


def _float_like(x: Tensor, *shape: int) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=x.device)


def _check(hidden, unembed, targets, chunk, softcap):
    if hidden.dim() != 2 or unembed.dim() != 2 or hidden.shape[1] != unembed.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(unembed.shape)}"
        raise ValueError(f"hidden must be (N, D) and unembed (V, D) of one width D, not {shapes}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        given = f"{targets.dtype} {tuple(targets.shape)}"
        raise ValueError(f"targets must be int64 ({len(hidden)},), not {given}")
    if targets.device.type == "cpu" and targets.numel():
        # elsewhere looking would wait for the device
        least, largest = int(targets.min()), int(targets.max())
        if not 0 <= least <= largest < len(unembed):
            last = len(unembed) - 1
            raise ValueError(f"targets must lie in 0..{last}, the vocabulary; found {largest}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be a number of tokens, 1 or more, not {chunk}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, not {softcap}")
