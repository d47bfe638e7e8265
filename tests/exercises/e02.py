"""Solutions of page 02."""

import math

import torch
from torch import Tensor

from minibnf.responses import Responses


def smoothed_dpo_dlogps(batch: Responses, beta: float, epsilon: float) -> Tensor:
    shift = batch.sums(batch.logps - batch.ref_logps)
    w, l = batch.pairs.T  # noqa: E741
    # d(-log σ(x))/dx = -σ(-x) and d(-log σ(-x))/dx = σ(x): together σ(x) - (1 - ε), zero where
    # σ(βΔ) = 1 - ε
    outer = beta * (torch.sigmoid(beta * (shift[w] - shift[l])) - (1 - epsilon)) / len(batch.pairs)
    # index_add: the pushes on a response in two pairs add up
    by_response = torch.zeros_like(shift).index_add(0, w, outer).index_add(0, l, -outer)
    return by_response[batch.owner]


def margin_left(share: float, beta: float) -> float:
    return math.log(2 / share - 1) / beta
