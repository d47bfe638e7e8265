"""Exercises of page 06, your model and your data: the solutions."""

from collections.abc import Iterable

from torch import Tensor


def rows(votes: Iterable[tuple[str, str, float]]) -> list[dict]:
    by_question: dict[str, list[tuple[str, float]]] = {}
    for question, answer, score in votes:
        by_question.setdefault(question, []).append((answer, score))
    made = []
    for question, answers in by_question.items():
        best, high = max(answers, key=lambda a: a[1])
        worst, low = min(answers, key=lambda a: a[1])
        if len(answers) == 1:
            made.append({"prompt": question, "completion": best, "label": high > 0})
        elif high > low:
            made.append({"prompt": question, "chosen": best, "rejected": worst})
    return made


def response_logps(logits: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    # of the next token at each place
    logps = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return logps.masked_fill(~mask[:, 1:], 0.0), mask[:, 1:]
