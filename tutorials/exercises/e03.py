"""Exercises of page 03, BNF: fill in the bodies, then `make exercise N=03`."""

from torch import Tensor


def weight(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """w = min(1, o(p)/o(r)), elementwise, of p = exp(logps) and r = exp(ref_logps); no epsilon,
    accurate near 0 and 1."""
    raise NotImplementedError


def rbnf_weight(logps: Tensor, ref_logps: Tensor, preferred: Tensor) -> Tensor:
    """max(r, w) where preferred (bool, one a token), w elsewhere."""
    raise NotImplementedError
