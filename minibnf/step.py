"""From packed batches to log-probabilities, losses, gradients and metrics; the frozen reference, computed once and cached."""

import hashlib
from itertools import accumulate, chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from minibnf.data import Batch, Example, pack
from minibnf.feedback import target_logits
from minibnf.files.safetensors import write_tensors
from minibnf.logprob import one_sweep, token_logps
from minibnf.losses import Loss
from minibnf.machine import to_device
from minibnf.model import Transformer


def forward_logps(model: Transformer, batch: Batch, dtype) -> Tensor:
    """(N,): log-probabilities of a batch's response tokens."""
    head = lambda x, unembed: token_logps(
        x[0, batch.predictors], unembed, batch.targets, softcap=model.config.final_softcap
    )
    return model(batch.tokens, batch.positions, batch.layout, dtype=dtype, head=head)


def read_responses(model, examples, max_tokens=4096, dtype=None, read=token_logps) -> list[Tensor]:
    """What `read` makes of every response token, a tensor per response, in the order of the examples, on the CPU: its
    log-probability (token_logps), its logit (target_logits) or both (logps_and_logits). dtype: what to compute in."""
    places = range(len(examples))
    steps = (pack(examples, list(places[i : i + 512]), max_tokens) for i in places[::512])
    found = dict(read_batches(model, steps, len(examples), dtype, read, "reading"))
    return [found[place] for place in sorted(found)]


@torch.no_grad()
def read_batches(model, steps, total: int, dtype, read, desc: str):
    """Yields (place, x) for every response in steps, lists of packed batches with `total` rows in all: x is what `read`
    makes of its tokens, on the CPU, and place is (index of its example, index in it)."""
    device, cap = model.unembed.device, model.config.final_softcap
    with tqdm(total=total, desc=desc, unit="row", disable=None, leave=False) as bar:
        for batch in chain.from_iterable(steps):
            batch = batch.to(device)
            head = lambda x, unembed, b=batch: read(
                x[0, b.predictors], unembed, b.targets, softcap=cap
            )
            x = model(batch.tokens, batch.positions, batch.layout, dtype=dtype, head=head).cpu()
            yield from zip(batch.order, x.split(torch.bincount(batch.owner).tolist()), strict=True)
            bar.update(len(batch.lines))


def logps_and_logits(hidden: Tensor, unembed: Tensor, targets: Tensor, softcap=None) -> Tensor:
    """(N, 2): log-probability and logit of each target."""
    both = (
        token_logps(hidden, unembed, targets, softcap=softcap),
        target_logits(hidden, unembed, targets, softcap=softcap),
    )
    return torch.stack(both, -1)


class Reference:
    """The reference's log-probabilities of every response token of a data set, flat, and where each response begins."""

    def __init__(self, examples: list[Example], logps: Tensor):
        self.logps, self.start, at = logps, {}, 0
        for i, example in enumerate(examples):
            for k, response in enumerate(example.responses):
                self.start[i, k] = at, at + len(response)
                at += len(response)

    def of(self, batch: Batch) -> Tensor:
        """(N,): the reference log-probabilities of a batch's response tokens."""
        return to_device(
            torch.cat([self.logps[slice(*self.start[place])] for place in batch.order]),
            batch.targets.device,
        )


def reference(model, examples: list[Example], steps, file: Path, key: str, dtype) -> Reference:
    """The log-probabilities of all examples, computed once and cached in file under a key that names the model, the tokens,
    the dtype and the packing.

    steps: the examples as training will meet them, lists of packed batches. A product of other sizes may round otherwise,
    so only where the reference is read in the same packs do policy and reference agree before the first step.
    """
    try:
        with safe_open(file, framework="pt") as cached:
            if (cached.metadata() or {}).get("key") == key:
                return Reference(examples, cached.get_tensor("logps"))
    except (OSError, SafetensorError):
        pass  # absent or damaged: made (again) below
    found = dict(read_batches(model, steps, len(examples), dtype, token_logps, "reference"))
    ref = Reference(examples, torch.cat([found[place] for place in sorted(found)]).float())
    write_tensors(file, {"logps": ref.logps}, {"key": key})
    return ref


def fingerprint(model: Transformer) -> str:
    """sha256 of every parameter's name and bytes."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(name.encode())
        found.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


@torch.no_grad()
def kl_estimate(model: Transformer, ref: Reference, batches: list[Batch], dtype, device) -> Tensor:
    """KTO's reference point z0, a scalar: max(0, mean over mismatched responses of their log-likelihood's shift), in nats."""
    shifts = []
    for batch in batches:
        batch = batch.to(device)
        logps = forward_logps(model, batch, dtype)
        shifts.append(batch.responses(logps, None).sums(logps - ref.of(batch)))
    return torch.cat(shifts).mean().clamp(min=0)


def batch_hyper(loss: Loss, hyper: dict, batches: list[Batch]) -> dict:
    """length="batch" means the whole batch's mean response length, whatever a micro-batch holds."""
    if hyper.get("length") != "batch":
        return hyper
    return {
        **hyper,
        "length": sum(len(b.targets) for b in batches) / sum(len(b.preferred) for b in batches),
    }


def loss_and_logps(
    model, batch: Batch, loss: Loss, hyper: dict, ref: Tensor | None, dtype
) -> tuple[Tensor, Tensor]:
    """The micro-batch's loss (scalar, differentiable) and its response log-probabilities (N,), detached."""

    def head(x, unembed):
        hidden, cap = x[0, batch.predictors], model.config.final_softcap
        if loss.couples:
            logps = token_logps(hidden, unembed, batch.targets, softcap=cap)
            return loss(batch.responses(logps, ref), **hyper), logps.detach()
        wide = torch.promote_types(hidden.dtype, torch.float32)
        shape = batch.responses(
            torch.zeros(len(batch.targets), device=hidden.device, dtype=wide), ref
        )
        c, preferred = loss.token_coefficients(shape, **hyper), batch.preferred[batch.owner]
        return one_sweep(
            hidden,
            unembed,
            batch.targets,
            ref,
            preferred,
            c,
            loss.potential,
            loss.slope,
            softcap=cap,
        )

    return model(batch.tokens, batch.positions, batch.layout, dtype=dtype, head=head)


def run_batches(
    model, batches, loss, hyper, ref: Reference | None, dtype, device, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """The loss over all micro-batches (a scalar, gradients accumulated if backward) and their R responses' log-likelihoods
    (1, R), with a reference also how far these have shifted from it (2, R), in nats. Nothing here waits for the device.

    A micro-batch's loss is a mean over its own examples, so it counts by its share of all of them.
    """
    values, sums = [], []
    count = lambda batch: len(batch.preferred) if loss.per_response else batch.examples
    examples = sum(map(count, batches))
    hyper = batch_hyper(loss, hyper, batches)
    for batch in batches:
        batch = batch.to(device)
        ref_logps = None if ref is None else ref.of(batch)
        with torch.set_grad_enabled(backward):
            value, logps = loss_and_logps(model, batch, loss, hyper, ref_logps, dtype)
            value = value * (count(batch) / examples)
        if backward:
            value.backward()
        values.append(value.detach())
        r = batch.responses(logps, ref_logps)
        sums.append(
            torch.stack([r.sums(logps)] + ([] if ref is None else [r.sums(logps - ref_logps)]))
        )
    return torch.stack(values).sum(), torch.cat(sums, 1)


def metrics(batches: list[Batch], sums: Tensor, beta: float) -> dict:
    """TRL's names, from run_batches' sums on the CPU. logps: log-likelihoods of whole responses in nats. rewards: beta (1 where
    a loss has none) times the shift against the reference; margins and accuracies are over pairs. Absent where undefined.
    """
    logps, *shift = sums
    preferred = torch.cat([b.preferred for b in batches])
    names = {"chosen": preferred, "rejected": ~preferred}
    found = {
        f"logps/{name}": logps[which].mean().item() for name, which in names.items() if which.any()
    }
    if shift:
        rewards = beta * shift[0]
        found |= {
            f"rewards/{name}": rewards[which].mean().item()
            for name, which in names.items()
            if which.any()
        }
        starts = accumulate((len(b.preferred) for b in batches), initial=0)
        pairs = torch.cat([b.pairs + at for at, b in zip(starts, batches, strict=False)])
        margins = beta * (shift[0][pairs[:, 0]] - shift[0][pairs[:, 1]])
        if len(margins):
            found |= {
                "rewards/margins": margins.mean().item(),
                "rewards/accuracies": (margins > 0).float().mean().item(),
            }
    return found
