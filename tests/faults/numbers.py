"""Numbers that go wrong, in any layer and under any loss; and batches that are split anyhow."""

from pathlib import Path
from random import Random

import torch

import minibnf.train
from minibnf.data import Example, pack, pair
from minibnf.losses import LOSSES
from minibnf.model import load
from minibnf.step import run_batches
from minibnf.train import main as train
from tests.faults.runs import WORLD, words
from tests.faults.trials import Campaign, in_a_child, one_line, run
from tests.strategies import referred

SPLITS = 20  # of a trial, which is one child
WAYS = ["a weight", "a gradient"]
WRONG = [float("nan"), float("inf"), -float("inf")]


def make_world(folder: Path) -> None:
    model = load(WORLD["model"]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)  # large enough to matter
    WORLD["wide"] = model
    WORLD["names"] = [name for name, _ in model.named_parameters()]


def cases() -> list[tuple[str, str, str]]:
    return [(loss, name, way) for loss in sorted(LOSSES) for name in WORLD["names"] for way in WAYS]


def number_wrong(k: int, random: Random, folder: Path):
    """One number of one tensor becomes NaN or infinite in one step."""
    loss, name, way = cases()[k]
    step, wrong, models = random.randrange(3), random.choice(WRONG), []
    make, rate = minibnf.train.optimizers, minibnf.train.learning_rate

    def optimizers(model, *rest):
        models.append(model)
        return make(model, *rest)

    def learning_rate(at, *rest):
        if at == step:
            p = dict(models[0].named_parameters())[name]
            target = p.data if way == "a weight" else p.grad
            target.view(-1)[random.randrange(target.numel())] = wrong
        return rate(at, *rest)

    def main(given):
        minibnf.train.optimizers, minibnf.train.learning_rate = optimizers, learning_rate
        return train(given)

    out = folder / "run"
    ended = run(main, words(out, "--loss", loss), folder)
    kept = sorted(path.name for path in out.glob("checkpoints/step-*"))
    why = one_line(ended)
    if not why and "stopped at step" not in ended.err:
        why = f"it does not say where it stopped: {ended}"
    if not why and ((out / "model").exists() or max(kept, default="") > f"step-{step:07d}"):
        why = f"saved all the same: {kept}"
    yield f"{way} of {name} under {loss}, step {step + 1}: {why}" if why else ""


def an_example(random: Random, prompts: list[tuple], line: int) -> Example:
    prompt = random.choice(prompts)
    chosen, rejected = (tuple(random.choices(range(600), k=random.randint(1, 9))) for _ in "ab")
    if random.random() < 0.6:
        return pair(prompt, chosen, rejected, line)
    return Example(prompt, (chosen,), (random.random() < 0.5,), line)


def batch_split(k: int, random: Random, folder: Path):
    """A step's loss and gradients, of all its rows at once and of any micro-batches."""
    name = sorted(LOSSES)[k % len(LOSSES)]
    loss, model = LOSSES[name], WORLD["wide"]

    def step(found, rows, parts) -> tuple:
        model.zero_grad()
        batches = [b for part in parts for b in pack(found, [rows[i] for i in part], 10**6)]
        hyper = loss.hyper({"kl": 0.3} if "kl" in loss.defaults else {})
        value, _ = run_batches(model, batches, loss, hyper, torch.float64, backward=True)
        return value, [p.grad.clone() for p in model.parameters()]

    def tries():
        for _ in range(SPLITS):
            prompts = [tuple(random.choices(range(600), k=random.randint(1, 6))) for _ in range(2)]
            found = [an_example(random, prompts, line) for line in range(1, random.randint(2, 9))]
            found.append(pair(prompts[0], (1, 2), (3,), 99))
            if loss.needs_pairs:
                found = [e for e in found if e.pairs]
            sizes = sum(len(r) for e in found for r in e.responses)
            found = referred(
                found, torch.tensor([random.uniform(-9, -0.1) for _ in range(sizes)]).double()
            )
            rows = random.sample(range(len(found)), len(found))
            whole, split = list(range(len(rows))), {}
            for i in whole:
                split.setdefault(random.randrange(4), []).append(i)
            (value, gradients), (other, others) = (
                step(found, whole, [whole]),
                step(found, rows, split.values()),
            )
            off = [
                (a - b).abs().max().item() / (1e-12 + a.abs().max().item())
                for a, b in zip(gradients, others, strict=True)
            ]
            same = torch.allclose(value, other, rtol=1e-9, atol=1e-12) and max(off) < 1e-7
            yield "" if same else f"{name}: {value} and {other}, gradients {max(off):.1e} apart"

    yield from in_a_child(tries, folder, memory=10**9, seconds=300)


CAMPAIGNS = [
    Campaign(
        "a number that goes wrong, per layer and loss",
        "the run stops in one error that says at which step; nothing of it is saved",
        number_wrong, lambda: len(cases()), 6,
    ),
    Campaign(
        "batches split anyhow, under each loss",
        "loss and gradients in float64 are those of the whole batch",
        batch_split, lambda: 6 * len(LOSSES), 2,
    ),
]  # fmt: skip
