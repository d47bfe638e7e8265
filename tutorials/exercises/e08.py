"""Exercises of page 08, log-probabilities without logits: fill in the bodies, then `make exercise
N=08`."""


def entropies(hidden, unembed, chunk):
    """(N,): -Σ_v p_v log p_v of softmax(hidden @ unembed.T), hidden (N, D), unembed (V, D), `chunk`
    tokens at a time.

    No tensor of more than chunk * V elements is made (chunk * V is more than N * D and V * D where
    this is tested)."""
    raise NotImplementedError


def dlogits_capped(x, targets, dlogps, cap):
    """(N, V): the gradient in x (N, V) of a loss of log softmax(z)[targets], z = cap * tanh(x /
    cap), dlogps (N,) being its gradient in those log-probabilities."""
    raise NotImplementedError
