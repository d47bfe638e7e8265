"""Exercises of page 10, the Transformer by hand: the solutions."""

import torch


def attend(q, k, v, window):
    """(H, S, d): causal attention of queries q (H, S, d) over keys k and values v (K, S, d), H a
    multiple of K.

    Head h uses key/value head h // (H / K); scores are divided by √d; a position sees itself and
    the window - 1 before it."""
    (H, S, d), K = q.shape, len(k)
    k, v = (x.repeat_interleave(H // K, 0) for x in (k, v))
    position = torch.arange(S)
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance < window)
    scores = (q @ k.transpose(1, 2) / d**0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def parameters(config):
    """The number of parameters of a Llama without biases, config being the dictionary of its
    config.json.

    It holds vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
    num_key_value_heads, head_dim and tie_word_embeddings; where that is False the unembedding is a
    matrix of its own.
    """
    D, d = config["hidden_size"], config["head_dim"]
    # q and o, k and v; then the MLP, and two norms
    attention = 2 * D * d * (config["num_attention_heads"] + config["num_key_value_heads"])
    layer = attention + 3 * D * config["intermediate_size"] + 2 * D
    matrices = 1 if config["tie_word_embeddings"] else 2
    return matrices * config["vocab_size"] * D + config["num_hidden_layers"] * layer + D
