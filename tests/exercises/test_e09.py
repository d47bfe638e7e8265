import pytest
import torch

from minibnf.losses import LOSSES
from minibnf.responses import Responses


def right(batch):
    return LOSSES["dpo"].gradient(batch, beta=0.1)


def margins(batch):
    shift = batch.sums(batch.logps - batch.ref_logps)
    return shift[batch.pairs[:, 0]] - shift[batch.pairs[:, 1]]


def spread(batch, push):
    """(P,) -> (N,): minus it for chosen tokens, plus it for rejected ones."""
    by_response = torch.zeros(len(batch.preferred), dtype=push.dtype)
    by_response[batch.pairs[:, 0]], by_response[batch.pairs[:, 1]] = -push, push
    return by_response[batch.owner]


def pushes(margin):
    return 0.1 * torch.sigmoid(-0.1 * margin)


def no_reference(batch):
    S = batch.sums(batch.logps)[batch.pairs]
    return spread(batch, pushes(S[:, 0] - S[:, 1]) / len(batch.pairs))


def first_pair(batch):
    push = pushes(margins(batch))
    return spread(batch, push[:1].expand(len(push)) / len(push))


def mean_of_shifts(batch):
    """Averages where DPO sums, then multiplies by the chosen response's length: right where both
    have one length."""
    n, shift = batch.lengths(), batch.sums(batch.logps - batch.ref_logps)
    w, rejected = batch.pairs.T
    margin = n[w] * (shift[w] / n[w] - shift[rejected] / n[rejected])
    return spread(batch, pushes(margin) / len(batch.pairs))


WRONG = {
    "the sign": lambda batch: -right(batch),
    "a sign of the rejected": lambda batch: -right(batch).abs(),
    "a factor β too few": lambda batch: right(batch) / 0.1,
    "no reference": no_reference,
    "no mean over pairs": lambda batch: spread(batch, pushes(margins(batch))),
    "the first pair's margin for all": first_pair,
    "means in place of sums": mean_of_shifts,
}


def test_the_right_gradient_has_no_counterexample(exercise):
    found = exercise.counterexample(right)
    assert found is None, "this gradient is right: is rounding taken for a difference?"


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_gradient_has_one(exercise, what):
    batch = exercise.counterexample(WRONG[what])
    assert isinstance(batch, Responses), f"no counterexample to: {what}"
    same = torch.allclose(WRONG[what](batch), right(batch), rtol=1e-6)
    assert not same, "on this batch both gradients agree: return the batch that `find` found"


def test_the_search_calls_the_gradient_many_times(exercise):
    calls = []
    exercise.counterexample(lambda batch: calls.append(batch) or right(batch))
    assert len(calls) >= 100, "few batches were tried: is the search stopped early?"
    assert {len(batch.pairs) for batch in calls} - {1}, "only single pairs were drawn"
    unequal = [batch for batch in calls if batch.lengths().unique().numel() > 1]
    assert unequal, "responses of one length only were drawn"
