"""The small world's exam: its figures by hand, and the command that prints before against after."""

from pathlib import Path

import pytest
import torch

from minibnf.data import read_examples
from minibnf.feedback import gini, target_logits
from minibnf.files.tokenizer import load_tokenizer
from minibnf.lab.exam import Exam, main, mean_and_error, win_rates
from minibnf.lab.language import LONG, QA, problems
from minibnf.lab.smallworld import write_base
from minibnf.model import fresh, load, save
from minibnf.step import read_responses
from tests.test_train import rows, write

TINY = Path(__file__).parents[1] / "weights" / "tiny"


def test_win_rates_by_hand():
    """Scores (5, 3) against (3, 1): 5 beats both, 3 ties once and wins once: (2 + 1.5)/4.

    The other way round it is the rest to one.
    """
    mine, theirs = torch.tensor([[5.0, 3.0], [0.0, 0.0]]), torch.tensor([[3.0, 1.0], [0.0, 4.0]])
    assert win_rates(mine, theirs).tolist() == [0.875, 0.25]
    torch.testing.assert_close(win_rates(theirs, mine), 1 - win_rates(mine, theirs))


def test_mean_and_standard_error():
    """(1, 3): mean 2, sample deviation sqrt(2), divided by sqrt(2)."""
    assert mean_and_error(torch.tensor([1.0, 3.0])) == (pytest.approx(2), pytest.approx(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exam") / "model"
    write_base(folder)
    save(fresh(folder, seed=0), folder)
    return folder


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", rows(3))


def test_shifts_and_gini_of_a_model_are_against_the_base_of_its_exam(model, pairs):
    tokenizer, base, other = load_tokenizer(model), fresh(model, seed=0), fresh(model, seed=1)
    read, _ = read_examples(pairs, tokenizer, 256)
    found = Exam(base, tokenizer, read, samples=2, count=1).grade(other)
    mine, theirs = ([x.sum().item() for x in read_responses(net, read)] for net in (other, base))
    gained = [m - t for m, t in zip(mine, theirs, strict=True)]
    assert found["shift/chosen"][0] == pytest.approx(sum(gained[0::2]) / 3, abs=1e-4)
    assert found["shift/rejected"][0] == pytest.approx(sum(gained[1::2]) / 3, abs=1e-4)
    mine, theirs = (
        torch.cat(read_responses(net, read, read=target_logits)) for net in (other, base)
    )
    # The exam reads logits beside log-probabilities, which may round apart.
    assert found["gini"][0] == pytest.approx(gini(mine - theirs), abs=1e-6)
    assert found["accuracy"] == (0, 0)


@pytest.mark.parametrize("kind, families", [("qa", QA), ("math", QA), ("long", LONG)])
def test_what_is_scored_by_family(monkeypatch, kind, families):
    """One who can add and nothing else, against itself."""
    known = {p.prompt: p.answer for p in problems(("add",), "test", 5, seed=0)}

    def adder(model, tokenizer, kind, *, temperature=1.0):
        knows = {} if temperature else known
        return lambda prompts, n, seed: [[knows.get(prompt, "?")] * n for prompt in prompts]

    monkeypatch.setattr("minibnf.lab.exam.sampler", adder)
    monkeypatch.setattr("minibnf.lab.exam.held_out", lambda model, examples: [])
    monkeypatch.setattr("minibnf.lab.exam.changes", lambda found, base: [])
    monkeypatch.setattr("minibnf.lab.exam.shifts", lambda examples: {})
    exam = Exam(None, None, [], count=5, kind=kind)
    assert {problem.family for problem in exam.questions} == set(families)
    found = exam.grade(None)
    assert {name: mean for name, (mean, _) in found.items()} == {
        "win_rate": 0.5, "judge_score": 0, "degenerate": 1, "accuracy": 0.25,
        "accuracy/add": 1, "accuracy/sub": 0, "accuracy/sort": 0, "accuracy/word": 0,
    }  # fmt: skip


def test_a_base_that_is_examined_draws_anew(pairs):
    """From the same seed its answers would be those it is compared with, every win rate 1/2."""
    base, tokenizer = load(TINY), load_tokenizer(TINY)
    read, _ = read_examples(pairs, tokenizer, 256)
    rate, error = Exam(base, tokenizer, read, samples=4, count=1).grade(base)["win_rate"]
    assert error > 0 and abs(rate - 0.5) < 6 * error


def command(base, model, pairs, *more):
    words = ["--base", base, "--model", model, "--pairs", pairs, "--samples", 2, *more]
    return main([str(word) for word in words])


def test_a_model_against_itself(model, pairs, capsys):
    assert command(model, model, pairs, "--count", 3) == 0
    text = capsys.readouterr().out
    for line in ("QA win rate", "reasoning accuracy", "log-likelihood shift, chosen", "Gini"):
        (found,) = [row for row in text.splitlines() if row.startswith(line)]
        before, after = found[38:].split()[:2]
        assert before == after, found
    assert "before" in text and "after" in text


def test_the_first_answer_that_changed_is_shown(model, pairs, capsys):
    assert command(TINY, model, pairs, "--count", 1) == 0
    text = capsys.readouterr().out
    assert "changed in 40 of 40 questions; the first:\n  " in text
    assert "\n    before  " in text and "\n    after   " in text


def test_what_goes_wrong_is_one_line(model, pairs, tmp_path, capsys):
    assert command(model, tmp_path / "nowhere", pairs) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        command(model, model, pairs, "--count", 0)
    assert "must be 1 or more" in capsys.readouterr().err
