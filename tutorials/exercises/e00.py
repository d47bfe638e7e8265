"""Exercises of page 00, one token: fill in the bodies, then `make exercise N=00`."""


def dlogits(z, y, dlogps):
    """(V,): the gradient in the logits z (V,) of a loss whose derivative in log softmax(z)[y] is
    the number dlogps."""
    raise NotImplementedError


def tent(p, r):
    """(n,): BNF's push on a token's logit, w (1 - p), for probabilities p (n,) from 0 to 1 and a
    reference 0 < r < 1."""
    raise NotImplementedError
