"""Exercises of page 01, why preferences: the solutions."""

import math

import torch
from torch import Tensor


def reward_gap(wins: int, losses: int) -> float:
    # the gradient is 0 where σ(gap) is the share of wins, so the gap is that share's logit
    return math.log(wins / losses)


def after_dpo(r: float, wins: int, losses: int, beta: float) -> float:
    # β (log-ratio of the first - log-ratio of the second) = gap; of two answers the second has
    # 1 - p, so the left side is β (logit p - logit r)
    logit = math.log(r / (1 - r)) + reward_gap(wins, losses) / beta
    return 1 / (1 + math.exp(-logit))


def ppo_dlogps(logps: Tensor, old_logps: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    ratio = (logps - old_logps).exp()
    # the clipped term is the smaller one where ρ has left the clip in the direction of A
    done = torch.where(advantages > 0, ratio > 1 + epsilon, ratio < 1 - epsilon)
    return torch.where(done, 0.0, -ratio * advantages / len(logps))
