"""What alignment changed: the small world's exact judge and exact answers, before against after.

    python -m minibnf.evaluate --base weights/tiny --model runs/small/bnf/model --pairs runs/small/held-out.jsonl

QA is asked of people that no preference pair spoke of (the test split): sampled answers at temperature 1, their mean judge
score (0 to 5), the share that is degenerate (0), and the win rate: the probability that an answer of the model beats one
of the base to the same question, a tie counting half. Reasoning is greedy, exact answers, on problems never trained on.
Shifts are mean log-likelihoods of held-out pairs' responses against the base, in nats a response; the Gini coefficient of
their tokens' absolute logit shifts says how concentrated the change is (0 evenly spread, 1 in one token).
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from minibnf.checkpoint import load
from minibnf.data import pack, read_examples
from minibnf.model import Transformer
from minibnf.feedback import gini, target_logits
from minibnf.logprob import token_logps
from minibnf.smallworld import QA, REASONING, Problem, problems, sampler, score
from minibnf.tokenizer import load_tokenizer


def mean_and_error(x: Tensor) -> tuple[float, float]:
    """The mean of x (n,) and its standard error."""
    return x.mean().item(), (x.std() / len(x) ** 0.5).item() if len(x) > 1 else float("nan")


def win_rates(scores: Tensor, base_scores: Tensor) -> Tensor:
    """(Q, n) and (Q, m) judge scores -> (Q,): the probability to beat the base on each question, a tie counting half."""
    mine, theirs = scores[:, :, None], base_scores[:, None, :]
    return ((mine > theirs).float() + 0.5 * (mine == theirs).float()).mean((1, 2))


def judged(asked: list[Problem], answers: list[list[str]]) -> Tensor:
    """(Q, n): the score of every answer."""
    return torch.tensor([[score(p, a) for a in texts] for p, texts in zip(asked, answers, strict=True)])


@torch.no_grad()
def read_responses(model: Transformer, tokenizer, file, max_tokens: int = 4096) -> tuple[Tensor, Tensor, Tensor]:
    """Of a preference file: (R,) the log-likelihood of every response in nats, (R,) whether it is preferred, and (N,) the
    logit of every response token."""
    examples, _ = read_examples(file, tokenizer, model.config.max_position_embeddings)
    sums, preferred, logits = [], [], []
    for batch in pack(examples, list(range(len(examples))), max_tokens):

        def head(x, unembed, batch=batch):
            hidden, cap = x[0, batch.predictors], model.config.final_softcap
            logps = token_logps(hidden, unembed, batch.targets, softcap=cap)
            return logps, target_logits(hidden, unembed, batch.targets, softcap=cap)

        logps, z = model(batch.tokens, batch.positions, batch.layout, head=head)
        sums.append(batch.responses(logps, None).sums(logps))
        preferred.append(batch.preferred)
        logits.append(z)
    return torch.cat(sums), torch.cat(preferred), torch.cat(logits)


def smallworld(base_directory, model_directory, pairs, samples: int, count: int, split: str, seed: int) -> dict:
    """Every number of the table, {name: (before, after, standard error of after)}, and a few answers of both."""
    tokenizer = load_tokenizer(base_directory)
    questions = problems(QA, split, 40, seed)
    chains = problems(REASONING, split, count * len(REASONING), seed)
    found, answers, read = {}, {}, {}
    base, aligned = load(base_directory), load(model_directory)
    for when, model in (("base", base), ("before", base), ("after", aligned)):
        draw = sampler(model, tokenizer)([p.prompt for p in questions], samples, seed + (when != "base"))
        scores = judged(questions, draw)
        if when == "base":  # what both are compared with: draws of its own
            base_scores = scores
            continue
        greedy = sampler(model, tokenizer, temperature=0)
        solved = greedy([p.prompt for p in chains], 1, seed)
        right = judged(chains, solved)[:, 0]
        found[when] = {
            "QA win rate against the base": mean_and_error(win_rates(scores, base_scores)),
            "QA judge score, 0 to 5": mean_and_error(scores.mean(1)),
            "QA degenerate answers": mean_and_error((scores == 0).float().mean(1)),
            "reasoning accuracy": mean_and_error(right),
        }
        for family in REASONING:
            mine = torch.tensor([p.family == family for p in chains])
            found[when][f"  {family}"] = mean_and_error(right[mine])
        if pairs:
            read[when] = read_responses(model, tokenizer, pairs)
        spoken = greedy([questions[0].prompt, chains[3].prompt], 1, seed)
        answers[when] = [texts[0] for texts in spoken]
    table = {name: (found["before"][name][0], *found["after"][name]) for name in found["after"]}
    if pairs:
        (before, preferred, z_before), (after, _, z_after) = read["before"], read["after"]
        for name, which in (("chosen", preferred), ("rejected", ~preferred)):
            if which.any():
                table[f"log-likelihood shift, {name} (nats)"] = (0.0, *mean_and_error((after - before)[which]))
        table["Gini of tokens' |logit shift|"] = (0.0, gini(z_after - z_before), float("nan"))
    asked = [questions[0].prompt, chains[3].prompt]
    return {"table": table, "answers": list(zip(asked, answers["before"], answers["after"], strict=True))}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("minibnf.evaluate", description="Before against after, in the small world.")
    p.add_argument("--base", required=True, metavar="DIR", help="the model before")
    p.add_argument("--model", required=True, metavar="DIR", help="the model after")
    p.add_argument("--pairs", metavar="FILE", help="held-out preference rows, for the log-likelihood shifts")
    p.add_argument("--samples", type=int, default=16, metavar="N", help="answers drawn to each QA question; default 16")
    p.add_argument("--count", type=int, default=100, metavar="N", help="problems of each reasoning family; default 100")
    p.add_argument("--split", choices=["validation", "test"], default="test", help="of the prompts; default test")
    p.add_argument("--seed", type=int, default=0, help="of prompts and samples; default 0")
    args = p.parse_args(argv)
    if args.samples < 1 or args.count < 1:
        p.error("--samples and --count must be 1 or more")
    try:
        found = smallworld(args.base, args.model, args.pairs, args.samples, args.count, args.split, args.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'':38}{'before':>9}{'after':>9}  ± standard error")
    for name, (before, after, error) in found["table"].items():
        print(f"{name:38}{before:9.3f}{after:9.3f}" + (f"  ± {error:.3f}" if error == error else ""))
    for prompt, before, after in found["answers"]:
        print(f"\n{prompt}\n  before  {before}\n  after   {after}")
    figure = Path(args.model).parent / "figures" / "training.png"
    if figure.is_file():
        print(f"\nfigure  {figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
