import json
from pathlib import Path

import pytest
import torch

from minibnf.attention import Causal
from minibnf.files.config import parse_config
from minibnf.model import Transformer

TINY = json.loads((Path(__file__).parents[2] / "weights/tiny/config.json").read_text())


@pytest.mark.parametrize("window", [1, 3, 100])
def test_attend_sees_a_window_of_what_came_before(exercise, window):
    torch.manual_seed(0)
    q, (k, v) = torch.randn(6, 7, 4).double(), torch.randn(2, 3, 7, 4).double()
    config = parse_config(TINY | {"head_dim": 4}, "here")
    wanted = Causal(config, 7, window, torch.float64, "cpu").attend(q[None], k[None], v[None])
    found = exercise.attend(q, k, v, window)
    assert found.shape == wanted[0].shape, "one output per query head: (H, S, d)"
    slip = "is 1/sqrt(d) there, is the mask before the softmax, does head h use key h // (H / K)?"
    if window == 1:
        slip = "at window 1 a position sees itself alone, so it gets its own value"
    elif window == 3:
        slip += " Of a window of 3, itself and the two before it: is it one too many or too few?"
    assert torch.allclose(found, wanted[0]), slip


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(exercise, tied):
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
    shapes = heads | {"hidden_size": 48, "intermediate_size": 80}
    for other in ({}, shapes):  # heads x head_dim need not be hidden_size
        raw = TINY | other | {"tie_word_embeddings": tied}
        with torch.device("meta"):
            model = Transformer(parse_config(raw, "here"), raw)
        found, wanted = exercise.parameters(raw), sum(p.numel() for p in model.parameters())
        slip = "are k and v narrower than q, two norms in each layer, one at the end?"
        if other:
            slip = "here heads x head_dim is not hidden_size: which of the two has each projection?"
        slip += "" if tied else " Not tied: is the unembedding a matrix of its own?"
        assert found == wanted, f"{found - wanted:+,} parameters: {slip}"
