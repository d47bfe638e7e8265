"""Exercises of page 09, proofs by machine: fill in the bodies, then `make exercise N=09`."""

from hypothesis import strategies as st


@st.composite
def batches(draw):
    """A minibnf.responses.Responses in float64: several pairs, their responses of different
    lengths."""
    raise NotImplementedError


def counterexample(gradient):
    """A batch on which gradient(batch) is not DPO's dL/dlogps at beta = 0.1; None if 300 batches
    show no difference."""
    raise NotImplementedError
