"""Exercises of page 03, BNF: fill in the bodies, then `make exercise N=03`."""

from torch import Tensor


def weight(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """w = min(1, o(p)/o(r)), elementwise, of p = exp(logps) and r = exp(ref_logps); no epsilon,
    accurate near 0 and 1."""
    raise NotImplementedError


def topr(logps: Tensor, ref_logps: Tensor, preferred: Tensor) -> Tensor:
    """Φ, elementwise: its derivative by logps is 1 where preferred (bool, one per token), else
    min(1, p/r); log p wherever that is 1, and continuous."""
    raise NotImplementedError
