"""Exercises of page 04, the trainer: fill in the bodies, then `make exercise N=04`."""

from torch import Tensor

from minibnf.responses import Responses


def adamw_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    betas: tuple,
    epsilon: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """New p, m and v after step number `step` (from 1) with gradient g; what was passed in stays as
    it was."""
    raise NotImplementedError


def pair_metrics(batch: Responses, beta: float) -> dict[str, float]:
    """{"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}.

    The reward of a response is beta times the shift of its log-likelihood against the reference.
    The first two are means over responses, the others over pairs. A tie counts as wrong."""
    raise NotImplementedError
