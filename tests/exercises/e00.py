"""Exercises of page 00, one token: the solutions."""

from torch import Tensor


def dlogits_soft(z: Tensor, q: Tensor) -> Tensor:
    # the sum over v of -q_v (1[u = v] - π_u)
    return q.sum() * z.softmax(-1) - q


def gains(z: Tensor, y: int) -> Tensor:
    pi = z.softmax(-1)
    moved = pi.clone()  # how the logits move: π - 1[v = y]
    moved[y] -= 1
    # dπ_v = π_v (dz_v - Σ_u π_u dz_u): a word gains if its logit rises more than the average
    return pi * (moved - pi @ moved)
