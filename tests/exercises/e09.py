"""Exercises of page 09, proofs by machine: the solutions."""

import torch
from hypothesis import find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from minibnf.losses import LOSSES
from minibnf.responses import Responses

LOG_PROB = st.floats(min_value=-6, max_value=-0.01)


@st.composite
def batches(draw):
    P = draw(st.integers(1, 3))
    owner = [k for k in range(2 * P) for _ in range(draw(st.integers(1, 3)))]
    values = st.lists(LOG_PROB, min_size=len(owner), max_size=len(owner))
    logps, ref_logps = (torch.tensor(draw(values), dtype=torch.float64) for _ in "pr")
    kinds, pairs = torch.tensor([True, False] * P), torch.arange(2 * P).reshape(P, 2)
    return Responses(logps, ref_logps, torch.tensor(owner), kinds, pairs)


def counterexample(gradient):
    def differs(batch):
        logps = batch.logps.clone().requires_grad_()
        moved = Responses(logps, batch.ref_logps, batch.owner, batch.preferred, batch.pairs)
        (right,) = torch.autograd.grad(LOSSES["dpo"].value(moved, beta=0.1), logps)
        return not torch.allclose(gradient(batch), right, rtol=1e-6)

    how = settings(max_examples=300, deadline=None, derandomize=True, database=None)
    try:
        return find(batches(), differs, settings=how)
    except NoSuchExample:
        return None
