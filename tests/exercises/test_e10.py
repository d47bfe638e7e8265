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
    assert torch.allclose(exercise.attend(q, k, v, window), wanted[0])


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(exercise, tied):
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
    shapes = heads | {"hidden_size": 48, "intermediate_size": 80}
    for other in ({}, shapes):  # heads x head_dim need not be hidden_size
        raw = TINY | other | {"tie_word_embeddings": tied}
        with torch.device("meta"):
            model = Transformer(parse_config(raw, "here"), raw)
        assert exercise.parameters(raw) == sum(p.numel() for p in model.parameters())
