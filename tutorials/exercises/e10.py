"""Exercises of page 10, the Transformer by hand: fill in the bodies, then `make exercise N=10`."""


def attend(q, k, v, window):
    """(H, S, d): causal attention of queries q (H, S, d) over keys k and values v (K, S, d), H a
    multiple of K.

    Head h uses key/value head h // (H / K); scores are divided by √d; a position sees itself and
    the window - 1 before it."""
    raise NotImplementedError


def parameters(config):
    """The number of parameters of a Llama without biases, config being the dictionary of its
    config.json.

    It holds vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
    num_key_value_heads, head_dim and tie_word_embeddings; where that is False the unembedding is a
    matrix of its own.
    """
    raise NotImplementedError
