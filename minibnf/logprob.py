"""Token log-probabilities from hidden states, chunk by chunk: what touches the vocabulary.

Shapes: N tokens, D width, V vocabulary, C tokens per chunk. A (C, V) buffer of logits is made, used
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
from itertools import accumulate, chain, pairwise
from math import ceil

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minibnf.kernels import add_weight_gradient, blocks, fused, kind, product, product_into

Judge = Callable[[int, Tensor], tuple[Tensor, Tensor]]
# Of a chunk: 64 MiB in float32 on a CPU, and 1 GiB on a GPU, where each chunk costs a pass over
# dunembed.
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**28}
# Of a chunk that must not be cut; one of more is read twice.
ROW_LOGITS = {"cpu": 2**26, "cuda": 2**29}


def token_logps(hidden, unembed, targets, *, chunk: int | None = None, softcap=None) -> Tensor:
    """(N,) float32 (float64 for float64 input): log softmax(hidden @ unembed.T)[targets], in nats.

    hidden (N, D), unembed (V, D), targets (N,) int64 in 0..V-1. chunk: tokens at a time, by default
    what CHUNK_LOGITS allows (chunk_tokens). softcap: logits are softcap * tanh(logits / softcap)
    (Gemma-2). Where hidden is bfloat16, products are taken in bfloat16 and everything after them in
    float32; dunembed comes in unembed's own dtype, a master's float32. Differentiable in hidden and
    unembed. Raises ValueError for shapes or targets that do not fit.
    """
    _check(hidden, unembed, targets)
    return _TokenLogps.apply(hidden, unembed, targets, chunk, softcap)


def sweep(
    hidden, unembed, targets, chunks: list[slice], judge: Judge | None = None, *, softcap=None
) -> tuple[Tensor, Tensor]:
    """A loss and its gradients in one pass over the vocabulary: what fine-tuning costs.

    hidden (N, D), unembed (V, D), targets (N,) as above. chunks: slices of the N tokens, one after
    another, each of which the loss can judge by itself (cuts). judge(k, logps of chunk k) -> the
    chunk's share of the loss, a scalar, and its dlogps; None: there is no loss, only logps.
    Returns the loss, differentiable in hidden and unembed, and logps (N,), detached.

    A chunk's dlogps is known once its own logps are, so dlogits is made while the chunk's
    probabilities are still there: backward makes no product with the vocabulary again. A chunk of
    more than ROW_LOGITS is read twice: for its logps, then for its gradients. The gradients are
    those of the loss as it is returned: call backward on it, not on a multiple of it.
    """
    _check(hidden, unembed, targets)
    if judge is None or not torch.is_grad_enabled():
        # inside a Function a parameter would still ask for its gradient
        hidden, unembed = hidden.detach(), unembed.detach()
    return _Sweep.apply(hidden, unembed, targets, chunks, judge, softcap)


def chunk_tokens(unembed: Tensor) -> int:
    """How many tokens have CHUNK_LOGITS of logits, on the device of unembed (V, D)."""
    return max(16, CHUNK_LOGITS[kind(unembed)] // len(unembed))


def cuts(sizes: list[int] | None, N: int, chunk: int) -> list[slice]:
    """The N tokens in chunks of nearly one size, about `chunk` tokens.

    A few tokens at the end would cost as much as many. sizes: the tokens of each row, where a row
    must not be cut; then a chunk ends with the row that is nearest to its share.
    """
    count = max(1, ceil(N / chunk))  # of chunks
    if sizes is None:
        C = max(1, ceil(N / count))
        stops = [*range(C, N, C), N]
    else:  # each k-th share of N ends at the nearest end of a row
        ends = list(accumulate(sizes))
        shares = [k * N / count for k in range(1, count + 1)]
        stops = sorted({min(ends, key=lambda end: abs(end - share)) for share in shares})
    return [slice(a, b) for a, b in pairwise([0, *stops])]


def _pieces(chunk: slice, unembed: Tensor) -> list[slice]:
    """A chunk whole or, where it has more than ROW_LOGITS, in pieces of CHUNK_LOGITS."""
    N = chunk.stop - chunk.start
    if N * len(unembed) <= ROW_LOGITS[kind(unembed)]:
        return [chunk]
    parts = cuts(None, N, chunk_tokens(unembed))
    return [slice(chunk.start + i.start, chunk.start + i.stop) for i in parts]


class _Logits:
    """The logits (N, V), of which one slice of the tokens exists at a time, and their gradients.

    Fresh memory costs more than the work on it (the system hands it out page by page), so one
    buffer, of the longest slice, is overwritten by each. Products go by blocks of the vocabulary.

    logps (N,): of what was read. wanted: whether hidden and unembed need gradients. dhidden has
    hidden's dtype, since each row is written once; dunembed is float32 or wider, since slices add
    up in it (autograd casts it at the end), and None, its product spared, where it is not wanted.
    """

    def __init__(self, hidden, unembed, targets, softcap, slices, wanted=(False, False)):
        self.hidden, self.unembed = hidden, unembed.to(hidden.dtype)
        self.targets, self.softcap = targets, softcap
        self.blocks = blocks(unembed)
        longest = max(i.stop - i.start for i in slices)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.buffer = hidden.new_empty(longest, len(unembed), dtype=wide)
        self.logps = hidden.new_empty(len(targets), dtype=wide)
        self.dhidden = torch.empty_like(hidden) if wanted[0] or wanted[1] else None
        wide = torch.promote_types(unembed.dtype, torch.float32)
        self.dunembed = torch.zeros_like(unembed, dtype=wide) if wanted[1] else None

    def read(self, i: slice) -> None:
        """The log-probabilities of the C tokens in slice i."""
        z = self.buffer[: i.stop - i.start]  # (C, V)
        for v in self.blocks:
            product_into(z[:, v], self.hidden[i], self.unembed[v])
        self.e, self.slope = z, _soft_capped(z, self.softcap)
        self.logps[i], self.rest, self.total = _exponentiate(z, self.targets[i, None])

    def push(self, i: slice, dlogps: Tensor) -> None:
        """Add the gradients that follow from dlogps (C,) of slice i, the last one that was read.

        dlogits (C, V) takes the place of e.
        """
        dlogits = self.e
        _differentiate(dlogits, self.targets[i, None], dlogps, self.rest, self.total)
        if self.slope is not None:
            dlogits.mul_(self.slope)
        dh = 0.0
        for v in self.blocks:
            d = dlogits[:, v].to(self.hidden.dtype)
            dh += product(d, self.unembed[v].t()).to(dlogits.dtype)
            if self.dunembed is not None:
                add_weight_gradient(self.dunembed[v], d, self.hidden[i])
        self.dhidden[i] = dh


def _soft_capped(z: Tensor, cap: float | None) -> Tensor | None:
    """Soft-cap the logits z in place; returns dz/dx."""
    if cap is None:
        return None
    z.div_(cap).tanh_()
    slope = 1 - z.square()
    z.mul_(cap)
    return slope


@fused
def _exponentiate(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits z (C, V) become e^(z - max), at the targets y (C, 1) 0. Returns logps, rest, Σ: (C,).

    rest is the sum of what z became, and Σ the sum with the target. The target is kept out because
    1 - p = rest/Σ and, where the target is the largest logit, log p = -log1p(rest) then keep their
    relative accuracy as p -> 1, which the odds in BNF's weight live on.
    """
    z_max = z.amax(1, keepdim=True)
    z_y = (z.gather(1, y) - z_max)[:, 0]
    z.sub_(z_max).exp_().scatter_(1, y, 0.0)
    rest = z.sum(1)
    total = rest + z_y.exp()
    return torch.where(z_y == 0, -torch.log1p(rest), z_y - total.log()), rest, total


@fused
def _differentiate(e: Tensor, y: Tensor, g: Tensor, rest: Tensor, total: Tensor) -> None:
    """What _exponentiate made of the logits becomes dlogits, given g = dlogps (C,).

    That is -g p_v, and at the target g (1 - p_y) = g rest/Σ.
    """
    scale = g / total
    e.mul_(-scale[:, None]).scatter_(1, y, (scale * rest)[:, None])


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, unembed, targets, chunk, softcap):
        ctx.save_for_backward(hidden, unembed, targets)
        ctx.softcap = softcap
        ctx.chunks = cuts(None, len(targets), chunk or chunk_tokens(unembed))
        logits = _Logits(hidden, unembed, targets, softcap, ctx.chunks)
        for i in ctx.chunks:
            logits.read(i)
        return logits.logps

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps):
        logits = _Logits(*ctx.saved_tensors, ctx.softcap, ctx.chunks, ctx.needs_input_grad)
        for i in ctx.chunks:
            logits.read(i)
            logits.push(i, dlogps[i])
        return logits.dhidden, logits.dunembed, None, None, None


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, unembed, targets, chunks, judge, softcap):
        pieces = [_pieces(chunk, unembed) for chunk in chunks]
        slices, wanted = chain.from_iterable(pieces), ctx.needs_input_grad
        logits = _Logits(hidden, unembed, targets, softcap, slices, wanted)
        loss, dlogps = logits.logps.new_zeros(()), torch.empty_like(logits.logps)
        for k, chunk in enumerate(chunks):
            for i in pieces[k]:
                logits.read(i)
            if judge is None:
                continue
            value, dlogps[chunk] = judge(k, logits.logps[chunk])
            loss += value
            for i in pieces[k] if logits.dhidden is not None else []:
                if len(pieces[k]) > 1:  # the buffer holds the last piece: each is read again
                    logits.read(i)
                logits.push(i, dlogps[i])
        ctx.save_for_backward(logits.dhidden, logits.dunembed)
        ctx.mark_non_differentiable(logits.logps)
        return loss, logits.logps

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        # elsewhere looking would wait for the device
        if dloss.device.type == "cpu" and dloss != 1:
            raise RuntimeError("the gradients of a sweep are those of its loss, not of a multiple")
        return *ctx.saved_tensors, None, None, None, None


def _check(hidden: Tensor, unembed: Tensor, targets: Tensor) -> None:
    N, V = len(targets), len(unembed)
    if hidden.shape != (N, unembed.shape[-1]) or unembed.dim() != 2 or targets.dim() != 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, unembed, targets))
        raise ValueError(f"hidden, unembed, targets must be (N, D), (V, D), (N,), not {shapes}")
    if targets.device.type == "cpu":  # elsewhere looking would wait for the device
        outside = targets[(targets < 0) | (targets >= V)]
        if len(outside):
            raise ValueError(f"targets must lie in 0..{V - 1}, the vocabulary, not at {outside[0]}")
