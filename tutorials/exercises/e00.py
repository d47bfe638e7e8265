"""Exercises of page 00, one token: fill in the bodies, then `make exercise N=00`."""

from torch import Tensor


def dlogits_soft(z: Tensor, q: Tensor) -> Tensor:
    """(V,): the gradient in the logits z (V,) of -Σ_v q_v log softmax(z)_v; q (V,) is constant, at
    least 0, and adds up to anything."""
    raise NotImplementedError


def gains(z: Tensor, y: int) -> Tensor:
    """(V,): how fast each word's probability changes at the start of a step that pushes y down, the
    derivative by ε of softmax(z - ε d log p/dz) at ε = 0, p = softmax(z)[y]."""
    raise NotImplementedError
