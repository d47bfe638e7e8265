"""Exercises of page 02; the specification stands at the page's end. `make exercise N=02` tests this
file."""

from torch import Tensor

from minibnf.responses import Responses


def smoothed_dpo_dlogps(batch: Responses, beta: float, epsilon: float) -> Tensor:
    """(N,): dL/dlogps of the mean over pairs of -(1 - ε) log σ(βΔ) - ε log σ(-βΔ), by hand.

    Δ, one number per pair: log(π/π_ref) of the chosen response less that of the rejected one, each
    a sum over the response's tokens."""
    raise NotImplementedError


def forward_dpo(shift_w: Tensor, shift_l: Tensor, beta: float) -> Tensor:
    """(P,): the loss of each pair that DPO's derivation gives for the objective E_π[R] - β KL(π_ref
    || π). shift_w, shift_l (P,): log(π(y)/π_ref(y)) of the chosen and the rejected response."""
    raise NotImplementedError
