"""Solutions of page 02."""

import torch
import torch.nn.functional as F
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


def forward_dpo(shift_w: Tensor, shift_l: Tensor, beta: float) -> Tensor:
    # the derivative of Σ π R + β Σ π_ref log π - λ Σ π is 0: R = λ - β π_ref/π, and λ cancels
    gap = beta * ((-shift_l).exp() - (-shift_w).exp())  # R_w - R_l
    return F.softplus(-gap)
