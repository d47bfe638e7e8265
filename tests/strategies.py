"""Hypothesis strategies by name.

Values are drawn directly and small, so that a failure shrinks to numbers one can read.
"""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from minibnf.data import Example, pair
from minibnf.losses import LOSSES, Responses

# of what runs a whole model for each loss; of what runs one; of what every loss has of its own
HANDFUL, FEW, QUARTER = (
    settings(max_examples=max(8, settings.default.max_examples // n)) for n in (25, 8, 4)
)

SMALL = st.floats(min_value=-6, max_value=-0.01, allow_nan=False)
UNCERTAIN = st.one_of(  # from nearly certain to all but impossible
    st.sampled_from([-1e-9, -1e-7, -1e-4, -20.0, -88.0, -104.0, -1e3, -1e4]),
    st.floats(min_value=-1e4, max_value=-1e-9),
)
EXTREME = st.one_of(st.just(0.0), UNCERTAIN)


@st.composite
def responses(draw, values=SMALL, paired=None, max_responses=6, max_length=4, dtype=torch.float64):
    """A Responses batch: 1 to max_responses responses of 1 to max_length tokens.

    paired: True, False or (None) mixed. Chosen and rejected stand in any order; a pair's
    log-probabilities may be equal to the reference's.
    """
    pairs, preferred = [], []
    if paired is not False:
        for _ in range(draw(st.integers(1 if paired else 0, max_responses // 2))):
            first_is_chosen = draw(st.booleans())
            i = len(preferred)
            preferred += [first_is_chosen, not first_is_chosen]
            pairs.append((i, i + 1) if first_is_chosen else (i + 1, i))
    if not paired:
        least, most = 0 if pairs else 1, max_responses - len(preferred) or 1
        preferred += draw(st.lists(st.booleans(), min_size=least, max_size=most))
    lengths = [draw(st.integers(1, max_length)) for _ in preferred]
    owner = [r for r, n in enumerate(lengths) for _ in range(n)]
    logps = draw(st.lists(values, min_size=len(owner), max_size=len(owner)))
    ref = [draw(st.one_of(st.just(x), values)) for x in logps]
    return Responses(
        torch.tensor(logps, dtype=dtype),
        torch.tensor(ref, dtype=dtype),
        torch.tensor(owner),
        torch.tensor(preferred),
        torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
    )


@st.composite
def hypers(draw, loss):
    """Hyper-parameters of a loss: its defaults, or others that it allows."""
    choices = {
        "length": st.sampled_from(["shorter", "own", "batch", 7.0]),
        "beta": st.sampled_from([0.1, 1.0, 2.5]),
        "lam": st.sampled_from([0.0, 0.3, 1.0]),
        "alpha": st.sampled_from([0.0, 0.01, 1.0]),
        "gamma": st.sampled_from([0.0, 0.5, 1.6]),
        "delta": st.sampled_from([0.0, 1.0, 30.0]),
        "lam_d": st.sampled_from([0.7, 1.0]),
        "lam_u": st.sampled_from([1.0, 2.0]),
        "kl": st.sampled_from([0.0, 0.7, 5.0]),
    }
    chosen = {}
    for name, default in loss.defaults.items():
        x = draw(st.one_of(st.just(default), choices[name]))
        chosen[name] = draw(choices[name]) if x is None else x
    return chosen


@st.composite
def batches(draw, name, **how):
    """A batch that the loss `name` can take, and hyper-parameters for it."""
    paired = True if LOSSES[name].needs_pairs else None
    return draw(responses(paired=paired, **how)), draw(hypers(LOSSES[name]))


def one_response(**changes):
    """A preferred response of two tokens, in no pair, but for the changes."""
    fields = {
        "logps": torch.tensor([-1.0, -2.0]),
        "ref_logps": torch.tensor([-1.0, -1.0]),
        "owner": torch.tensor([0, 0]),
        "preferred": torch.tensor([True]),
        "pairs": torch.empty(0, 2, dtype=torch.int64),
    }
    return Responses(**{**fields, **changes})


@st.composite
def examples(draw, vocabulary=97, max_examples=6):
    """Token-id examples, paired and unpaired, some with the same prompt; at least one."""
    token = st.integers(0, vocabulary - 1)
    prompts = [draw(st.lists(token, min_size=1, max_size=5).map(tuple)) for _ in range(2)]
    response = st.lists(token, min_size=1, max_size=6).map(tuple)
    found = []
    for line in range(1, draw(st.integers(1, max_examples)) + 1):
        prompt = draw(st.sampled_from(prompts))
        if draw(st.booleans()):
            found.append(pair(prompt, draw(response), draw(response), line))
        else:
            found.append(Example(prompt, (draw(response),), (draw(st.booleans()),), line))
    return found


def referred(examples, reference=None):
    """The examples with a flat reference (tokens,), to which by default each is e^-2 probable."""
    sizes = [len(response) for e in examples for response in e.responses]
    flat = torch.full((sum(sizes),), -2.0) if reference is None else reference
    parts = iter(flat.split(sizes))
    return [e._replace(ref_logps=tuple(next(parts) for _ in e.responses)) for e in examples]
