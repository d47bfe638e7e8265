"""Exercises of page 00, one token: the solutions."""

import torch


def dlogits(z, y, dlogps):
    """(V,): the gradient in the logits z (V,) of a loss whose derivative in log softmax(z)[y] is
    the number dlogps."""
    gradient = -dlogps * z.softmax(-1)
    gradient[y] += dlogps
    return gradient


def tent(p, r):
    """(n,): BNF's push on a token's logit, w (1 - p), for probabilities p (n,) from 0 to 1 and a
    reference 0 < r < 1."""
    return torch.where(p < r, p * (1 - r) / r, 1 - p)
