import json
from pathlib import Path

import pytest

from minibnf.files.rows import parse_row


def test_rows_of_votes(exercise):
    votes = [("Q1", "good", 3), ("Q2", "alone, liked", 1), ("Q1", "bad", -2)]
    votes += [("Q3", "alone, not liked", 0), ("Q1", "as good", 3), ("Q4", "equal", 1.5)]
    votes += [("Q1", "as bad", -2), ("Q4", "equal too", 1.5), ("Q1", "between", 0)]
    found = list(exercise.rows(votes))
    assert {"prompt": "Q1", "chosen": "good", "rejected": "bad"} in found, (
        "Q1: the best against the worst; of equally good answers the first counts"
    )
    assert not any(row["prompt"] == "Q4" for row in found), "equal scores say nothing: no row"
    assert found == [
        {"prompt": "Q1", "chosen": "good", "rejected": "bad"},
        {"prompt": "Q2", "completion": "alone, liked", "label": True},
        {"prompt": "Q3", "completion": "alone, not liked", "label": False},
    ], "is a lone answer's label `score > 0`, and are questions in order of first appearance?"
    for row in found:  # as the trainer reads them: a label is a bool and no number
        parse_row(row, "row")


def test_both_answers_below_zero_are_a_pair_all_the_same(exercise):
    votes = iter([("Q", "bad", -5), ("Q", "less bad", -1)])  # an iterator is allowed
    pair = {"prompt": "Q", "chosen": "less bad", "rejected": "bad"}
    assert list(exercise.rows(votes)) == [pair], "best and worst count, not the sign of a score"


RUNS = Path(__file__).parents[2] / "tutorials" / "evidence" / "bad-runs"
SLIPS = {
    "sound": "nothing is wrong here: small margins, and chosen answers became likelier",
    "rate": "chosen answers lost 39 nats, in training and held out: is it more than the margin?",
    "swapped": "training says all is well; what does the held-out accuracy say?",
    "few": "compare the margin of the last training step with the held-out one",
    "one-sided": "which metrics do the training rows lack?",
    "beta": "rewards are beta times the shift: compare rewards/chosen with how logps/chosen moved",
}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", SLIPS)
def test_diagnosis_of_a_run_whole_and_cut(exercise, name, every):
    """every=2: half of the rows between the first and the last two are gone."""
    rows = [json.loads(line) for line in (RUNS / f"{name}.jsonl").read_text().splitlines()]
    rows = [*rows[:-2:every], *rows[-2:]]
    found = exercise.diagnose(rows)
    assert found == name, f"{name} taken for {found}: {SLIPS[name]}"
