"""Exercises of page 06, your model and your data: fill in the bodies, then `make exercise N=06`."""

from collections.abc import Iterable


def rows(votes: Iterable[tuple[str, str, float]]) -> list[dict]:
    """(question, answer, score) -> rows of text that the trainer takes, questions in order of first
    appearance.

    {"prompt", "chosen", "rejected"}: the best and the worst answer, of equally good ones the first;
    {"prompt", "completion", "label"} where there is one answer, label: whether its score is above
    0; no row where several scores are all equal."""
    raise NotImplementedError


def diagnose(rows: list[dict]) -> str:
    """The rows of a metrics.jsonl -> what is wrong with the run: "rate" (too high), "swapped"
    (labels), "few" (rows, too many epochs), "one-sided" (data), "beta" (too small), or "sound".

    Rows with "loss" are training steps. Rows with "eval_loss" are the held-out rows measured, the
    first of them before training, the last after it."""
    raise NotImplementedError
