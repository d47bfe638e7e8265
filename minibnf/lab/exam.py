"""The small world's exam: what models are asked, made once per base, and what one of them scores.

    python -m minibnf.lab.exam --base DIR --model DIR --pairs FILE      # before against after

    exam = Exam(base, tokenizer, read_examples("held-out.jsonl", ...)[0], split="test")
    exam.measure(model)  # {"win_rate": (Q,), one number per question, "accuracy": ...}
    exam.grade(model)    # {"win_rate": (0.654, 0.017), "accuracy": ...}

A figure is (mean, standard error) of what was measured.

QA is asked about people that no preference pair spoke of. Answers are sampled at temperature 1.
Their figures are the mean judge score (0 to 5), the share that is degenerate (score 0), and the win
rate: the probability that an answer of the model beats one of the base to the same question, a tie
counting half. Reasoning is greedy, with exact answers, on problems never trained on. Shifts are
mean log-likelihoods of held-out responses against the base, in nats per response. The Gini
coefficient of their tokens' absolute logit shifts says how concentrated the change is: 0 is evenly
spread, 1 is all in one token.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from minibnf.data import Example, pairs_of, read_examples
from minibnf.evaluate import wins
from minibnf.feedback import gini, target_logits
from minibnf.files.config import announce_ignored
from minibnf.files.terminal import ArgumentParser, in_one_line, positive, show
from minibnf.files.tokenizer import load_tokenizer
from minibnf.lab.language import LONG, QA, REASONING, Problem, problems, score
from minibnf.lab.smallworld import Sample, sampler
from minibnf.logprob import token_logps
from minibnf.machine import memory_advice
from minibnf.model import Transformer, load
from minibnf.step import read_responses

Measured = dict[str, Tensor]  # {name: one number per question, problem or response}
Figures = dict[str, tuple[float, float]]  # {name: (mean, standard error)}


def mean_and_error(x: Tensor) -> tuple[float, float]:
    """The mean of x (n,) and its standard error."""
    return x.mean().item(), (x.std() / len(x) ** 0.5).item() if len(x) > 1 else math.nan


def figures_of(measured: Measured) -> Figures:
    return {name: mean_and_error(x) for name, x in measured.items()}


def win_rates(scores: Tensor, base_scores: Tensor) -> Tensor:
    """(Q, n) and (Q, m) judge scores -> (Q,): the probability to beat the base on each question."""
    return wins(scores[:, :, None], base_scores[:, None, :]).mean((1, 2))


def scores_of(sample: Sample, asked: list[Problem], n: int, seed: int) -> Tensor:
    """(Q, n): the scores of n answers to every problem."""
    answers = sample([problem.prompt for problem in asked], n, seed)
    scores = [[score(p, text) for text in texts] for p, texts in zip(asked, answers, strict=True)]
    return torch.tensor(scores)


# ---- Held-out rows: how likelihoods moved ----


def held_out(model: Transformer, examples: list[Example]) -> list[Tensor]:
    """(n, 2) of each response: the log-probability and the logit of its n tokens."""
    return read_responses(model, examples, read=logps_and_logits)


def logps_and_logits(hidden: Tensor, unembed: Tensor, targets: Tensor, softcap=None) -> Tensor:
    """(N, 2): log-probability and logit of each target."""
    logps = token_logps(hidden, unembed, targets, softcap=softcap)
    return torch.stack([logps, target_logits(hidden, unembed, targets, softcap=softcap)], -1)


def changes(found: list[Tensor], base: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(R,): by how much each response's log-likelihood exceeds the base's; (N,): so each logit."""
    moved = [(a - b).unbind(-1) for a, b in zip(found, base, strict=True)]
    return torch.stack([logps.sum() for logps, _ in moved]), torch.cat([x for _, x in moved])


def shifts(examples: list[Example], gained: Tensor, logits: Tensor) -> Measured:
    """shift/chosen, shift/rejected (nats per response) and the gini of logit shifts."""
    preferred, table = torch.tensor([p for e in examples for p in e.preferred]), {}
    for name, side in {"chosen": preferred, "rejected": ~preferred}.items():
        if side.any():
            table[f"shift/{name}"] = gained[side]
    return table | {"gini": torch.tensor([gini(logits)])}


def on_files(
    model: Transformer, examples: list[Example], base: list[Tensor], solutions: list[Example]
) -> Measured:
    """preference, shifts and gini of pairs; solutions, if any, in nats per token.

    preference is the share of pairs whose chosen response gained more likelihood than its rejected
    one. A tie is half; for the base all are ties.
    """
    gained, logits = changes(held_out(model, examples), base)
    told = wins(*gained[pairs_of(examples)].unbind(1))
    table = {"preference": told} | shifts(examples, gained, logits)
    if solutions:
        means = [logps.mean() for logps in read_responses(model, solutions)]
        table["solutions"] = torch.stack(means)
    return table


# ---- The exam ----


class Exam:
    """What models are asked in the small world, and what the base made of it.

    40 questions of a split ("test", "validation"), of kind "long" long ones, and `count` problems
    per reasoning family. Each model draws `samples` answers to each question. The shifts are
    measured on the preference examples, a list of data.Example.
    """

    def __init__(
        self, base, tokenizer, examples, *, kind="qa", split="test", samples=16, count=100, seed=0
    ):
        self.tokenizer, self.kind, self.samples, self.seed = tokenizer, kind, samples, seed
        self.questions = problems(LONG if kind == "long" else QA, split, 40, seed)
        self.chains = problems(REASONING, split, count * len(REASONING), seed)
        drawn = sampler(base, tokenizer, kind)
        self.base_scores = scores_of(drawn, self.questions, samples, seed)
        self.examples, self.held = examples, held_out(base, examples)

    def grade(self, model: Transformer) -> Figures:
        """What a model scores; the error of gini is nan."""
        return figures_of(self.measure(model))

    def measure(self, model: Transformer) -> Measured:
        """win_rate, judge_score, degenerate: of sampled answers, one number per question of QA.

        accuracy, accuracy/add and so on: 1 or 0 per problem, of greedy answers to reasoning.
        shift/chosen and shift/rejected: nats, one number per response. gini: one number.
        """
        # From the base's seed, a model equal to it would answer as it did and tie always.
        drawn, greedy = (
            sampler(model, self.tokenizer, self.kind, temperature=t) for t in (1.0, 0.0)
        )
        scores = scores_of(drawn, self.questions, self.samples, self.seed + 1)
        right = scores_of(greedy, self.chains, 1, self.seed)[:, 0]
        found = {
            "win_rate": win_rates(scores, self.base_scores),
            "judge_score": scores.mean(1),
            "degenerate": (scores == 0).float().mean(1),
            "accuracy": right,
        }
        for family in REASONING:
            mine = torch.tensor([p.family == family for p in self.chains])
            found[f"accuracy/{family}"] = right[mine]
        return found | shifts(self.examples, *changes(held_out(model, self.examples), self.held))


# ---- The command ----

LABELS = {  # what the names of a grade are called in a table
    "win_rate": "QA win rate against the base",
    "judge_score": "QA judge score, 0 to 5",
    "degenerate": "QA degenerate answers",
    "accuracy": "reasoning accuracy",
    **{f"accuracy/{family}": f"  {family}" for family in REASONING},
    "shift/chosen": "log-likelihood shift, chosen (nats)",
    "shift/rejected": "log-likelihood shift, rejected (nats)",
    "gini": "Gini of tokens' |logit shift|",
}


def before_and_after(args: argparse.Namespace) -> None:
    """Print the table of --base and --model, and what each answers to two prompts."""
    tokenizer, base, aligned = load_tokenizer(args.base), load(args.base), load(args.model)
    announce_ignored(args.base, base.raw)
    announce_ignored(args.model, aligned.raw)
    examples, _ = read_examples(args.pairs, tokenizer, base.config.max_position_embeddings)
    how = {name: getattr(args, name) for name in ("split", "samples", "count", "seed")}
    exam = Exam(base, tokenizer, examples, **how)
    before, after = exam.grade(base), exam.grade(aligned)
    show(f"{'':38}{'before':>9}{'after':>9}  ± standard error")
    for name, (value, error) in after.items():
        shown = f"  ± {error:.3f}" if error == error else ""
        show(f"{LABELS[name]:38}{before[name][0]:9.3f}{value:9.3f}{shown}")
    greedy = [sampler(model, tokenizer, temperature=0) for model in (base, aligned)]
    for what, some in {"questions": exam.questions, "problems": exam.chains}.items():
        prompts = [problem.prompt for problem in some]
        old, new = (sample(prompts, 1, args.seed) for sample in greedy)
        changed = [row for row in zip(prompts, old, new, strict=True) if row[1] != row[2]]
        first = "; the first:" if changed else ""
        show(f"\nThe likeliest answer changed in {len(changed)} of {len(some)} {what}{first}")
        for prompt, (was,), (now,) in changed[:1]:
            show(f"  {prompt}\n    before  {was}\n    after   {now}")
    figure = Path(args.model).parent / "figures" / "training.png"
    if figure.is_file():
        show(f"\nfigure  {figure}")


@in_one_line
def main(argv: list[str] | None = None) -> None:
    p = ArgumentParser("python -m minibnf.lab.exam", allow_abbrev=False)
    p.description = "Two models in the small world, before alignment against after."
    a = p.add_argument
    a("--model", required=True, metavar="DIR", help="the model after alignment")
    a("--base", required=True, metavar="DIR", help="the model before alignment")
    a("--pairs", required=True, metavar="FILE", help="held-out preference rows, for the shifts")
    a("--samples", type=positive, default=16, metavar="N", help="answers per question; default 16")
    a("--count", type=positive, default=100, metavar="N", help="problems per family; default 100")
    a("--split", choices=["validation", "test"], default="test", help="default test")
    a("--seed", type=int, default=0, help="of prompts and samples; default 0")
    args = p.parse_args(argv)
    with memory_advice(f"lower --samples (now {args.samples})"):
        before_and_after(args)


if __name__ == "__main__":
    sys.exit(main())
