import os

import pytest
import torch
from hypothesis import settings

# tensors here are small; threads that wait for each other cost more than they bring
torch.set_num_threads(1)
settings.register_profile(
    "test", max_examples=200, deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True
)
settings.register_profile("all", settings.get_profile("test"), max_examples=2000)  # make test-all
settings.register_profile(
    "mutants", settings.get_profile("test"), max_examples=8, derandomize=True, database=None
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))


@pytest.fixture(scope="session")
def tiny():
    """A tiny random Transformer in float64, whose weights are large enough to matter."""
    from minibnf.files.config import parse_config
    from minibnf.model import Transformer

    raw = dict(
        model_type="llama", vocab_size=97, hidden_size=32, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=True, max_position_embeddings=256,
    )  # fmt: skip
    config = parse_config(raw, "tiny")
    model = Transformer(config, {}).init_weights(0).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    return model
