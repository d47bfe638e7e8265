"""Exercises of page 06, your model and your data: the solutions."""

from collections.abc import Iterable


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


def diagnose(rows: list[dict]) -> str:
    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row]
    first, last = held_out[0], held_out[-1]
    if "logps/chosen" not in steps[-1] or "logps/rejected" not in steps[-1]:
        return "one-sided"
    if last["eval_rewards/accuracies"] < 0.5:
        return "swapped"
    moved = last["eval_logps/chosen"] - first["eval_logps/chosen"]  # nats
    if abs(last["eval_rewards/chosen"]) < 0.05 * abs(moved):  # rewards are beta times the shift
        return "beta"
    if steps[-1]["rewards/margins"] > 5 * last["eval_rewards/margins"]:
        return "few"
    return "rate" if moved < -2 else "sound"
