"""Exercises of page 04, the trainer: fill in the bodies, then `make exercise N=04`."""

from torch import Tensor


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


def micro_batch_weights(examples: list[int]) -> list[float]:
    """The weights with which micro-batches' mean losses add up to the mean over all their
    examples."""
    raise NotImplementedError
