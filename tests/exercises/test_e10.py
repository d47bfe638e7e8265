import torch

from minibnf.files.rows import parse_row


def test_rows_of_votes(exercise):
    votes = [
        ("Q1", "good", 3),
        ("Q2", "alone, liked", 1),
        ("Q1", "bad", -2),
        ("Q3", "alone, not liked", 0),
        ("Q1", "as good", 3),
        ("Q4", "equal", 1.5),
        ("Q1", "as bad", -2),
        ("Q4", "equal too", 1.5),
        ("Q1", "between", 0),
    ]
    found = list(exercise.rows(votes))
    assert found == [
        {"prompt": "Q1", "chosen": "good", "rejected": "bad"},
        {"prompt": "Q2", "completion": "alone, liked", "label": True},
        {"prompt": "Q3", "completion": "alone, not liked", "label": False},
    ]
    for number, row in enumerate(
        found
    ):  # as the trainer reads them: a label is a bool and no number
        parse_row(row, f"row {number}")


def test_both_answers_below_zero_are_a_pair_all_the_same(exercise):
    assert list(exercise.rows([("Q", "bad", -5), ("Q", "less bad", -1)])) == [
        {"prompt": "Q", "chosen": "less bad", "rejected": "bad"}
    ]


def test_rows_takes_an_iterator(exercise):
    assert len(list(exercise.rows(iter([("Q", "a", 1), ("Q", "b", 0)])))) == 1


def test_response_logps_token_by_token(exercise):
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(7, (2, 5))
    mask = torch.tensor([[False, False, True, True, True], [False, True, True, False, False]])
    logps, shifted = exercise.response_logps(logits, tokens, mask)
    assert logps.shape == (2, 4) and torch.equal(shifted, mask[:, 1:])
    for b in range(2):
        for t in range(1, 5):
            expected = (
                logits[b, t - 1].softmax(-1)[tokens[b, t]].log()
                if mask[b, t]
                else torch.tensor(0.0)
            )
            torch.testing.assert_close(logps[b, t - 1], expected.to(torch.float64))


def test_nothing_is_fed_back_outside_the_mask(exercise):
    torch.manual_seed(0)
    logits, tokens = (
        torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True),
        torch.randint(6, (1, 4)),
    )
    mask = torch.tensor([[False, True, True, False]])
    logps, _ = exercise.response_logps(logits, tokens, mask)
    assert logps[0, 2] == 0
    logps.sum().backward()
    assert logits.grad[0, :2].abs().sum() > 0 and logits.grad[0, 2:].abs().sum() == 0
