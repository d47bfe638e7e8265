"""Exercises of page 02; the specification stands at the page's end. `make exercise N=02` tests this
file."""

from torch import Tensor

from minibnf.responses import Responses


def smoothed_dpo_dlogps(batch: Responses, beta: float, epsilon: float) -> Tensor:
    """(N,): dL/dlogps of the mean over pairs of -(1 - ε) log σ(βΔ) - ε log σ(-βΔ), by hand."""
    raise NotImplementedError


def margin_left(share: float, beta: float) -> float:
    """The Δ in nats at which DPO's push has fallen to this share (above 0, at most 1) of its value
    at Δ = 0."""
    raise NotImplementedError
