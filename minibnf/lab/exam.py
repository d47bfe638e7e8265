"""The small world's exam: what models are asked, made once a base, and what one of them scores in it.

    asked = exam(base, tokenizer, split="test", examples=read_examples("held-out.jsonl", tokenizer, 256)[0])
    small_world(model, tokenizer, asked)    # {"win_rate": (0.654, 0.017), "accuracy": ...}: (mean, standard error)

QA is asked of people that no preference pair spoke of: sampled answers at temperature 1, their mean judge score (0 to 5),
the share that is degenerate (0), and the win rate: the probability that an answer of the model beats one of the base to
the same question, a tie counting half. Reasoning is greedy, exact answers, on problems never trained on. Shifts are mean
log-likelihoods of held-out responses against the base, in nats a response; the Gini coefficient of their tokens' absolute
logit shifts says how concentrated the change is (0 evenly spread, 1 in one token).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minibnf.data import Example, pack, pairs_of
from minibnf.feedback import gini
from minibnf.lab.smallworld import QA, REASONING, Problem, problems, sampler, score
from minibnf.model import Transformer
from minibnf.step import logps_and_logits, read_responses


def mean_and_error(x: Tensor) -> tuple[float, float]:
    """The mean of x (n,) and its standard error."""
    return x.mean().item(), (x.std() / len(x) ** 0.5).item() if len(x) > 1 else float("nan")


def win_rates(scores: Tensor, base_scores: Tensor) -> Tensor:
    """(Q, n) and (Q, m) judge scores -> (Q,): the probability to beat the base on each question, a tie counting half."""
    mine, theirs = scores[:, :, None], base_scores[:, None, :]
    return ((mine > theirs).float() + 0.5 * (mine == theirs).float()).mean((1, 2))


def judged(asked: list[Problem], answers: list[list[str]]) -> Tensor:
    """(Q, n): the score of every answer."""
    return torch.tensor(
        [[score(p, a) for a in texts] for p, texts in zip(asked, answers, strict=True)]
    )


LABELS = {  # what the names of small_world() are called in a table
    "win_rate": "QA win rate against the base",
    "judge_score": "QA judge score, 0 to 5",
    "degenerate": "QA degenerate answers",
    "accuracy": "reasoning accuracy",
    **{f"accuracy/{family}": f"  {family}" for family in REASONING},
    "shift/chosen": "log-likelihood shift, chosen (nats)",
    "shift/rejected": "log-likelihood shift, rejected (nats)",
    "gini": "Gini of tokens' |logit shift|",
}


class HeldOut(NamedTuple):
    """Rows that were not trained on, pairs and single answers, and the base's log-probability and logit of each token."""

    examples: list[Example]
    logps: list[Tensor]  # a tensor a response
    logits: list[Tensor]


def held_out(base: Transformer, examples: list[Example]) -> HeldOut:
    both = [x.unbind(-1) for x in read_responses(base, examples, read=logps_and_logits)]
    return HeldOut(examples, [logps for logps, _ in both], [logits for _, logits in both])


def shifts(found: HeldOut, base: HeldOut, which: Tensor) -> dict[str, tuple[float, float]]:
    """Of the responses that `which` (R,) bool names: shift/chosen and shift/rejected, nats a response; gini of logit shifts."""
    preferred = torch.tensor([p for e in base.examples for p in e.preferred])
    sums = torch.stack([(a - b).sum() for a, b in zip(found.logps, base.logps, strict=True)])
    table = {}
    for name, side in (("chosen", preferred & which), ("rejected", ~preferred & which)):
        if side.any():
            table[f"shift/{name}"] = mean_and_error(sums[side])
    moved = torch.cat(
        [a - b for a, b, w in zip(found.logits, base.logits, which, strict=True) if w]
    )
    return table | {"gini": (gini(moved), float("nan"))}


class Exam(NamedTuple):
    """What models are asked in the small world, and what the base made of it."""

    questions: list[Problem]
    chains: list[Problem]
    samples: int  # answers drawn to each question
    seed: int
    base_scores: Tensor  # (questions, samples)
    held: HeldOut  # preference rows, may be none


def exam(
    base,
    tokenizer,
    *,
    split="test",
    samples=16,
    count=100,
    seed=0,
    examples: list[Example] | None = None,
) -> Exam:
    """40 questions of a split ("test", "validation"), `count` problems of each reasoning family and, for the shifts,
    preference examples (data.read_examples); the base draws `samples` answers to each question."""
    questions, chains = (
        problems(QA, split, 40, seed),
        problems(REASONING, split, count * len(REASONING), seed),
    )
    scores = judged(
        questions, sampler(base, tokenizer)([p.prompt for p in questions], samples, seed)
    )
    held = held_out(base, examples) if examples else HeldOut([], [], [])
    return Exam(questions, chains, samples, seed, scores, held)


def small_world(model, tokenizer, exam: Exam) -> dict[str, tuple[float, float]]:
    """{name: (mean, standard error)} of a model in an exam.

    win_rate judge_score degenerate: of sampled answers to QA, the error over its questions. accuracy, accuracy/add and so
    on: of greedy answers to reasoning. Where the exam has examples, shift/chosen and shift/rejected, in nats a response,
    and gini (its error is nan).
    """
    # draws of its own: with the base's seed, a model equal to the base would answer alike and tie throughout
    answers = sampler(model, tokenizer)(
        [p.prompt for p in exam.questions], exam.samples, exam.seed + 1
    )
    scores = judged(exam.questions, answers)
    solved = sampler(model, tokenizer, temperature=0)([p.prompt for p in exam.chains], 1, exam.seed)
    right = judged(exam.chains, solved)[:, 0]
    found = {
        "win_rate": mean_and_error(win_rates(scores, exam.base_scores)),
        "judge_score": mean_and_error(scores.mean(1)),
        "degenerate": mean_and_error((scores == 0).float().mean(1)),
        "accuracy": mean_and_error(right),
    }
    for family in REASONING:
        found[f"accuracy/{family}"] = mean_and_error(
            right[torch.tensor([p.family == family for p in exam.chains])]
        )
    if exam.held.examples:
        own = held_out(model, exam.held.examples)
        found |= shifts(own, exam.held, torch.ones(len(own.logps), dtype=torch.bool))
    return found


def on_files(model: Transformer, base: HeldOut) -> dict[str, tuple[float, float]]:
    """{name: (mean, standard error)}. Of pairs: preference, the share whose chosen response gained more likelihood than its
    rejected one (a tie, as for the base all are, is half), shift/chosen and shift/rejected in nats a response, and the gini of
    logit shifts; of single answers: solutions, nats a token."""
    own, pairs = held_out(model, base.examples), pairs_of(base.examples)
    gains = torch.stack([(a - b).sum() for a, b in zip(own.logps, base.logps, strict=True)])
    chosen, rejected = gains[pairs].unbind(1)
    table = {
        "preference": mean_and_error(
            (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        )
    }
    paired = torch.zeros(len(gains), dtype=torch.bool).index_fill(0, pairs.flatten(), True)
    table |= shifts(own, base, paired)
    if not paired.all():
        means = [x.mean() for x, p in zip(own.logps, paired, strict=True) if not p]
        table["solutions"] = mean_and_error(torch.stack(means))
    return table


def token_weights(
    base: Transformer, model: Transformer, examples: list[Example], loss, hyper: dict
) -> dict[str, list]:
    """Of the responses' tokens, "chosen" and "rejected": [(x, w), ...] with x = log o(p) - log o(r), p under the model and r
    under the base, and w the push on the token's logit that autograd finds through the soft-max and the loss, over 1 - p, and
    over what that is at the base. For BNF w = min(1, o(p)/o(r)) (theory.md, identity 1)."""
    (batch,) = pack(examples, list(range(len(examples))), sum(e.tokens for e in examples))
    read = lambda m: m(
        batch.tokens,
        batch.positions,
        batch.layout,
        head=lambda x, u: m.logits(x[0, batch.predictors], u),
    )
    with torch.no_grad():
        logits, reference = read(model).double(), read(base).double()
    target = batch.targets[:, None]
    of = lambda z: z.log_softmax(-1).gather(-1, target)[:, 0]

    def push(z):
        z = z.clone().requires_grad_()
        loss.value(batch.responses(of(z), of(reference)), **hyper).backward()
        return z.grad.gather(-1, target)[:, 0].abs() / -torch.expm1(of(z.detach()))

    odds = torch.logit(of(logits).exp()) - torch.logit(of(reference).exp())
    weight, good = push(logits) / push(reference), batch.preferred[batch.owner]
    usable = torch.isfinite(odds) & torch.isfinite(
        weight
    )  # where the base gives no gradient there is nothing to compare
    table = {}
    for name, which in (("chosen", good & usable), ("rejected", ~good & usable)):
        table[name] = list(zip(odds[which].tolist(), weight[which].tolist(), strict=True))
    return table
