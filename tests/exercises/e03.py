"""Exercises of page 03, BNF: the solutions."""

import torch
from torch import Tensor


def weight(logps: Tensor, ref_logps: Tensor) -> Tensor:
    # o(p)/o(r) = (p/r) (1 - r)/(1 - p); where p < r, 1 - p is above 0
    below = logps < ref_logps
    safe = torch.where(below, logps, -1.0)
    ratio = (logps - ref_logps).exp() * torch.expm1(ref_logps) / torch.expm1(safe)
    return torch.where(below, ratio, 1.0)


def topr(logps: Tensor, ref_logps: Tensor, preferred: Tensor) -> Tensor:
    # dΦ/dp = w/p = 1/r below r, so Φ = p/r + a constant; at p = r it meets log r
    below = ref_logps + torch.expm1((logps - ref_logps).clamp(max=0))
    return torch.where(preferred | (logps >= ref_logps), logps, below)
