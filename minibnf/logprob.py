"""Token log-probabilities from hidden states, chunk by chunk: the one place that touches the vocabulary.

Shapes: N tokens, D width, V vocabulary, C tokens a chunk. A (C, V) buffer of logits is made, used and overwritten chunk
by chunk; nothing of size (N, V) ever exists.

    token_logps   log-probabilities with a hand-derived backward, for any loss (the logits are made again in backward)
    one_sweep     loss, dhidden and dunembed in a single pass, for a loss whose tokens do not couple

The naive expression that both are tested against:

    logits = hidden @ unembed.T                                      # (N, V)
    logps = logits.log_softmax(-1).gather(1, targets[:, None])       # (N, 1)
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minibnf.kernels import product, weight_gradient


def token_logps(
    hidden, unembed, targets, *, chunk: int | None = None, softcap: float | None = None
) -> Tensor:
    """(N,) float32 (float64 for float64 input): log softmax(hidden @ unembed.T)[targets], in nats.

    hidden (N, D), unembed (V, D), targets (N,) int64 in 0..V-1. chunk: tokens at a time, by default what keeps a chunk's
    logits near 64 MiB. softcap: logits are softcap * tanh(logits / softcap) (Gemma-2). Where hidden is bfloat16, products
    are taken in bfloat16 and everything after them in float32; dunembed comes in unembed's own dtype, a master's float32.
    Differentiable in hidden and unembed. Raises ValueError for shapes or targets that do not fit.
    """
    _check(hidden, unembed, targets, chunk, softcap)
    return _TokenLogps.apply(hidden, unembed, targets, chunk, softcap)


def one_sweep(
    hidden: Tensor,
    unembed: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None,
    preferred: Tensor,
    c: Tensor,
    potential: Callable,
    slope: Callable,
    *,
    chunk: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """L = Σ_i c_i Φ(log p_i) and its gradients in one pass over the vocabulary: what fine-tuning costs.

    hidden (N, D), unembed (V, D), targets (N,) as above; ref_logps (N,) or None; preferred (N,) bool, by token; c (N,) from
    Loss.token_coefficients; potential and slope are its Φ(logps, ref_logps, preferred) and dΦ/dlogps, elementwise.
    Returns the scalar loss, differentiable in hidden and unembed, and logps (N,), detached.
    A token's dlogps is known once its own log p is, so dlogits is made while the chunk's probabilities are still there:
    the product with the vocabulary is not computed again in backward.
    """
    _check(hidden, unembed, targets, chunk, softcap)
    if (
        not torch.is_grad_enabled()
    ):  # inside a Function a parameter would still ask for its gradient
        hidden, unembed = hidden.detach(), unembed.detach()
    return _OneSweep.apply(
        hidden, unembed, targets, ref_logps, preferred, c, potential, slope, chunk, softcap
    )


# Derivation. With z = hidden @ unembed.T and an upstream g_i = dL/dlogps_i,
#     dlogits_iv = g_i (1[v = y_i] - p_iv)        dhidden = dlogits @ unembed        dunembed = dlogits.T @ hidden
# A soft cap z = κ tanh(x/κ) multiplies dlogits by dz/dx = 1 - (z/κ)².


def _sweep(hidden, unembed, targets, chunk, softcap):
    """Chunk by chunk: its slice of the tokens and its _softmax_parts, in one buffer that the next chunk overwrites.

    Fresh memory costs more than the work on it (the system hands it out page by page), so the buffer is made once, and the
    products, here and in _accumulate, go by blocks of the vocabulary that stay in the processor's cache.
    """
    chunks = _chunks(len(targets), unembed, chunk)
    buffer = _float_like(hidden, max((i.stop - i.start for i in chunks), default=0), len(unembed))
    for i in chunks:
        z = buffer[: i.stop - i.start]
        for v in _blocks(unembed):
            z[:, v] = product(hidden[i], unembed[v])
        yield i, *_softmax_parts(z, targets[i], softcap)


def _chunks(N: int, unembed: Tensor, chunk: int | None) -> list[slice]:
    """At most `chunk` tokens each, and nearly all of one size: a few tokens at the end would cost as much as many."""
    most = chunk or max(16, 2**24 // len(unembed))  # 2^24 float32 logits are 64 MiB
    C = -(-N // max(1, -(-N // most)))
    return [slice(i, min(i + C, N)) for i in range(0, N, max(C, 1))]


def _blocks(unembed) -> list[slice]:
    """The vocabulary in blocks of about 8 MiB, on a CPU; a GPU takes it whole."""
    V, D = unembed.shape
    size = max(256, 2**21 // D) if unembed.device.type == "cpu" else V
    return [slice(v, v + size) for v in range(0, V, size)]


def _softmax_parts(z, targets, softcap):
    """Of a chunk's logits z: e (C, V), exponentiated in place with the target's entry set to 0; rest (C,), their sum;
    Σ (C,), the sum with the target; the target's log-probability (C,); and dz/dx (C, V) of a soft cap, or None.

    The target is kept out of the sum because 1 - p = rest/Σ and, where the target is the largest logit,
    log p = -log1p(rest) then keep their relative accuracy as p -> 1, which the odds in BNF's weight live on.
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
    return e, rest, total, logps, slope


def _dlogits_in_place(e, rest, total, targets, slope, g):
    """Turn e of _softmax_parts into dlogits (C, V): -g p_v, and at the target g (1 - p_y) = g rest/Σ."""
    scale = g / total
    e.mul_(-scale[:, None])
    e.scatter_(1, targets[:, None], (scale * rest)[:, None])
    return e if slope is None else e.mul_(slope)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, unembed, targets, chunk, softcap):
        ctx.save_for_backward(hidden, unembed, targets)
        ctx.chunk, ctx.softcap = chunk, softcap
        logps = _float_like(hidden, len(targets))
        for i, _, _, _, logp, _ in _sweep(
            hidden, unembed.to(hidden.dtype), targets, chunk, softcap
        ):
            logps[i] = logp
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps):
        hidden, unembed, targets = ctx.saved_tensors
        dhidden, dunembed = _empty_gradients(hidden, unembed, ctx.needs_input_grad)
        u = unembed.to(hidden.dtype)
        for i, e, rest, total, _, slope in _sweep(hidden, u, targets, ctx.chunk, ctx.softcap):
            dlogits = _dlogits_in_place(e, rest, total, targets[i], slope, dlogps[i])
            _accumulate(dhidden, dunembed, i, dlogits, hidden[i], u)
        return dhidden, dunembed, None, None, None


class _OneSweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, unembed, targets, ref_logps, preferred, c, potential, slope_of, chunk, softcap
    ):
        logps, u = _float_like(hidden, len(targets)), unembed.to(hidden.dtype)
        wanted = any(ctx.needs_input_grad[:2])
        dhidden, dunembed = _empty_gradients(hidden, unembed, ctx.needs_input_grad)
        loss = logps.new_zeros(())
        for i, e, rest, total, logps[i], slope in _sweep(hidden, u, targets, chunk, softcap):
            ref = None if ref_logps is None else ref_logps[i].to(logps.dtype)
            loss += (c[i] * potential(logps[i], ref, preferred[i])).sum()
            if wanted:
                dlogps = c[i] * slope_of(logps[i], ref, preferred[i])
                dlogits = _dlogits_in_place(e, rest, total, targets[i], slope, dlogps)
                _accumulate(dhidden, dunembed, i, dlogits, hidden[i], u)
        ctx.save_for_backward(dhidden, dunembed)
        ctx.mark_non_differentiable(logps)
        return loss, logps

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        dhidden, dunembed = ctx.saved_tensors
        scale = lambda x: None if x is None else x * dloss.to(x.dtype)
        return scale(dhidden), scale(dunembed), *[None] * 8


def _empty_gradients(hidden, unembed, needed):
    """dhidden in hidden's dtype (each row is written once), dunembed in float32 or wider: chunks add up in it, and
    autograd casts it to unembed's dtype at the end."""
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
    return torch.empty(
        shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device
    )


def _check(hidden, unembed, targets, chunk, softcap):
    if hidden.dim() != 2 or unembed.dim() != 2 or hidden.shape[1] != unembed.shape[1]:
        raise ValueError(
            f"hidden must be (N, D) and unembed (V, D) of one width D, not {tuple(hidden.shape)} and {tuple(unembed.shape)}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 ({len(hidden)},), not {targets.dtype} {tuple(targets.shape)}"
        )
    on_cpu = (
        targets.device.type == "cpu" and targets.numel()
    )  # elsewhere looking would wait for the device
    if on_cpu and not 0 <= int(targets.min()) <= int(targets.max()) < len(unembed):
        raise ValueError(
            f"targets must lie in 0..{len(unembed) - 1}, the vocabulary; found {int(targets.max())}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be a number of tokens, 1 or more, not {chunk}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, not {softcap}")
