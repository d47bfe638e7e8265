"""Exercises of page 08, log-probabilities without logits: the solutions."""

import torch


def entropies(hidden, unembed, chunk):
    """(N,): -Σ_v p_v log p_v of softmax(hidden @ unembed.T), hidden (N, D), unembed (V, D), `chunk`
    tokens at a time.

    No tensor of more than chunk * V elements is made (chunk * V is more than N * D and V * D where
    this is tested)."""
    found = []
    for h in hidden.split(chunk):
        logp = (h @ unembed.T).log_softmax(-1)
        found.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(found)


def dlogits_capped(x, targets, dlogps, cap):
    """(N, V): the gradient in x (N, V) of a loss of log softmax(z)[targets], z = cap * tanh(x /
    cap), dlogps (N,) being its gradient in those log-probabilities."""
    t = torch.tanh(x / cap)
    dz = -dlogps[:, None] * (cap * t).softmax(-1)
    dz[range(len(targets)), targets] += dlogps
    return dz * (1 - t**2)
