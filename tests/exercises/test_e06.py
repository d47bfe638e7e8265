import pytest
import torch

from minibnf.files.rows import parse_row


def test_rows_of_votes(exercise):
    votes = [("Q1", "good", 3), ("Q2", "alone, liked", 1), ("Q1", "bad", -2)]
    votes += [("Q3", "alone, not liked", 0), ("Q1", "as good", 3), ("Q4", "equal", 1.5)]
    votes += [("Q1", "as bad", -2), ("Q4", "equal too", 1.5), ("Q1", "between", 0)]
    found = list(exercise.rows(votes))
    assert found == [
        {"prompt": "Q1", "chosen": "good", "rejected": "bad"},
        {"prompt": "Q2", "completion": "alone, liked", "label": True},
        {"prompt": "Q3", "completion": "alone, not liked", "label": False},
    ]
    for row in found:  # as the trainer reads them: a label is a bool and no number
        parse_row(row, "row")


def test_both_answers_below_zero_are_a_pair_all_the_same(exercise):
    votes = iter([("Q", "bad", -5), ("Q", "less bad", -1)])  # an iterator is allowed
    pair = {"prompt": "Q", "chosen": "less bad", "rejected": "bad"}
    assert list(exercise.rows(votes)) == [pair]


def test_response_logps_token_by_token(exercise):
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(7, (2, 5))
    mask = torch.tensor([[False, False, True, True, True], [False, True, True, False, False]])
    logps, shifted = exercise.response_logps(logits, tokens, mask)
    assert logps.shape == (2, 4) and torch.equal(shifted, mask[:, 1:])
    for b in range(2):
        for t in range(1, 5):
            expected = logits[b, t - 1].softmax(-1)[tokens[b, t]].log() if mask[b, t] else 0.0
            assert logps[b, t - 1].item() == pytest.approx(float(expected))


def test_nothing_is_fed_back_outside_the_mask(exercise):
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(6, (1, 4))
    mask = torch.tensor([[False, True, True, False]])
    logps, _ = exercise.response_logps(logits, tokens, mask)
    assert logps[0, 2] == 0
    logps.sum().backward()
    assert logits.grad[0, :2].abs().sum() > 0 and logits.grad[0, 2:].abs().sum() == 0
