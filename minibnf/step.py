"""One step, from packed batches to loss, gradients and metrics; and the frozen reference.

Shapes: N response tokens and R responses of a batch, P pairs, D width, V vocabulary.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from minibnf.data import Batch, Example, pack
from minibnf.feedback import target_logits
from minibnf.files.safetensors import write_tensors
from minibnf.logprob import chunk_tokens, cuts, sweep, token_logps
from minibnf.losses import Loss
from minibnf.machine import to_device
from minibnf.model import Transformer
from minibnf.responses import Responses

# ----------------------------------------------------------------------------------- loss, gradient


def batch_loss(
    model: Transformer, batch: Batch, loss: Loss, hyper: dict, ref: Tensor | None, E: int, dtype
) -> tuple[Tensor, Tensor]:
    """A micro-batch's share of the step's loss, a scalar, and logps (N,), detached.

    ref (N,) or None: the reference's log-probabilities. E: how many examples the step has. dtype:
    what to compute in. Call backward on the loss as it is.
    """

    def head(x, unembed):
        chunks = chunks_of(batch, loss, unembed)

        def judge(k: int, logps: Tensor) -> tuple[Tensor, Tensor]:
            part = responses_of(batch, loss, chunks[k], logps, ref, E)
            return loss.value(part, **hyper), loss.gradient(part, **hyper)

        cap = model.config.final_softcap
        return sweep(x[0, batch.predictors], unembed, batch.targets, chunks, judge, softcap=cap)

    return model(batch.tokens, batch.positions, batch.layout, dtype=dtype, head=head)


def batch_logps(model: Transformer, batch: Batch, loss: Loss, dtype) -> Tensor:
    """(N,): the log-probabilities that batch_loss sees, rounded alike, for the same products."""

    def head(x, unembed):
        chunks, cap = chunks_of(batch, loss, unembed), model.config.final_softcap
        return sweep(x[0, batch.predictors], unembed, batch.targets, chunks, softcap=cap)[1]

    return model(batch.tokens, batch.positions, batch.layout, dtype=dtype, head=head)


def chunks_of(batch: Batch, loss: Loss, unembed: Tensor) -> list[slice]:
    """Slices of a batch's response tokens, each of which the loss can judge by itself.

    Those of a token-local loss are cut anywhere, others only between rows.
    """
    sizes = None if loss.token_local else [b - a for a, b in pairwise(batch.starts)]
    return cuts(sizes, len(batch.targets), chunk_tokens(unembed))


def responses_of(
    batch: Batch, loss: Loss, i: slice, logps: Tensor, ref: Tensor | None, E: int
) -> Responses:
    """What the loss is to see of the tokens in slice i, of which logps are given."""
    owner, preferred = batch.owner[i], batch.preferred
    pairs, lengths = batch.pairs, batch.lengths
    if not loss.token_local:  # of these rows alone
        first, first_pair = batch.starts[i.start]
        end, end_pair = batch.starts[i.stop]
        owner, preferred, lengths = owner - first, preferred[first:end], lengths[first:end]
        pairs = pairs[first_pair:end_pair] - first
    ref = None if ref is None else ref[i]
    return Responses(logps, ref, owner, preferred, pairs, lengths, E)


def run_batches(
    model, batches: list[Batch], loss: Loss, hyper: dict, ref, dtype, device, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """A step's loss over all its micro-batches, and what its responses sum to.

    ref: the Reference, or None. Returns the loss, a scalar whose gradients are accumulated if
    backward, and the R responses' log-likelihoods (1, R), with a reference also how far these have
    shifted from it (2, R), in nats. Nothing here waits for the device.
    """
    values, sums = [], []
    E = sum(len(b.preferred) if loss.per_response else b.examples for b in batches)
    hyper = step_hyper(hyper, batches)
    for batch in batches:
        batch = batch.to(device)
        ref_logps = None if ref is None else ref.of(batch)
        with torch.set_grad_enabled(backward):
            value, logps = batch_loss(model, batch, loss, hyper, ref_logps, E, dtype)
        if backward:
            value.backward()
        values.append(value.detach())
        responses = batch.responses(logps, ref_logps)
        found = [responses.sums(logps)]
        if ref is not None:
            found.append(responses.sums(logps - ref_logps))
        sums.append(torch.stack(found))
    return torch.stack(values).sum(), torch.cat(sums, 1)


def step_hyper(hyper: dict, batches: list[Batch]) -> dict:
    """length="batch" means the whole step's mean response length, whatever a micro-batch holds."""
    if hyper.get("length") != "batch":
        return hyper
    tokens, responses = sum(len(b.targets) for b in batches), sum(len(b.preferred) for b in batches)
    return {**hyper, "length": tokens / responses}


@torch.no_grad()
def kl_estimate(model: Transformer, ref, batches: list[Batch], loss: Loss, dtype, device) -> Tensor:
    """KTO's reference point z0, a scalar in nats.

    max(0, the mean over mismatched responses of how far their log-likelihood has shifted).
    """
    shifts = []
    for batch in batches:
        batch = batch.to(device)
        logps = batch_logps(model, batch, loss, dtype)
        shifts.append(batch.responses(logps, None).sums(logps - ref.of(batch)))
    return torch.cat(shifts).mean().clamp(min=0)


def metrics(batches: list[Batch], sums: Tensor, beta: float) -> dict:
    """TRL's names, from run_batches' sums on the CPU; absent where undefined.

    logps: log-likelihoods of whole responses in nats. rewards: beta (1 where a loss has none) times
    the shift against the reference; margins and accuracies are over pairs.
    """
    logps, *shift = sums
    preferred = torch.cat([b.preferred for b in batches])
    names = {"chosen": preferred, "rejected": ~preferred}
    found = {}
    for name, which in names.items():
        if which.any():
            found[f"logps/{name}"] = logps[which].mean().item()
    if shift:
        rewards = beta * shift[0]
        for name, which in names.items():
            if which.any():
                found[f"rewards/{name}"] = rewards[which].mean().item()
        starts = accumulate((len(b.preferred) for b in batches), initial=0)
        pairs = torch.cat([b.pairs + at for at, b in zip(starts, batches, strict=False)])
        margins = beta * (shift[0][pairs[:, 0]] - shift[0][pairs[:, 1]])
        if len(margins):
            found["rewards/margins"] = margins.mean().item()
            found["rewards/accuracies"] = (margins > 0).float().mean().item()
    return found


# ------------------------------------------------------------------------------------ the reference


class Reference:
    """The reference's log-probabilities of every response token of a data set, flat."""

    def __init__(self, examples: list[Example], logps: Tensor):
        self.logps, self.start, at = logps, {}, 0  # start: where each response begins and ends
        for i, example in enumerate(examples):
            for k, response in enumerate(example.responses):
                self.start[i, k] = at, at + len(response)
                at += len(response)

    def of(self, batch: Batch) -> Tensor:
        """(N,): the reference log-probabilities of a batch's response tokens."""
        found = [self.logps[slice(*self.start[place])] for place in batch.order]
        return to_device(torch.cat(found), batch.targets.device)


def reference(
    model, examples: list[Example], steps: Iterable[list[Batch]], file: Path, key: str, loss, dtype
) -> Reference:
    """The log-probabilities of all examples, computed once and cached in file.

    steps: the examples as training will meet them, lists of packed batches. A product of other
    sizes may round otherwise, so only where the reference is read in the same packs and chunks do
    policy and reference agree before the first step. key names the model, the tokens, the dtype and
    the packing; a cache under another key is made again.
    """
    try:
        with safe_open(file, framework="pt") as cached:
            if (cached.metadata() or {}).get("key") == key:
                return Reference(examples, cached.get_tensor("logps"))
    except (OSError, SafetensorError):
        pass  # absent or damaged: made (again) below

    def read(batch: Batch) -> Tensor:
        return batch_logps(model, batch, loss, dtype)

    found = dict(read_batches(model, steps, len(examples), read, "reference"))
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


# ------------------------------------------------------------------------- reading any responses


def read_responses(model, examples, max_tokens=4096, dtype=None, read=token_logps) -> list[Tensor]:
    """What `read` makes of every response token: a tensor per response, on the CPU, in order.

    read(hidden, unembed, targets, softcap=): its log-probability (token_logps), its logit
    (target_logits) or both (logps_and_logits). dtype: what to compute in.
    """
    cap = model.config.final_softcap

    def read_batch(batch: Batch) -> Tensor:
        def head(x, unembed):
            return read(x[0, batch.predictors], unembed, batch.targets, softcap=cap)

        return model(batch.tokens, batch.positions, batch.layout, dtype=dtype, head=head)

    places = range(len(examples))
    steps = (pack(examples, list(places[i : i + 512]), max_tokens) for i in places[::512])
    found = dict(read_batches(model, steps, len(examples), read_batch, "reading"))
    return [found[place] for place in sorted(found)]


@torch.no_grad()
def read_batches(model, steps, total: int, read, desc: str) -> Iterator[tuple[tuple, Tensor]]:
    """Yields (place, x) for every response in steps, lists of packed batches with `total` rows.

    x is its part of read(batch), on the CPU; place is (index of its example, index in it).
    """
    with tqdm(total=total, desc=desc, unit="row", disable=None, leave=False) as bar:
        for batch in chain.from_iterable(steps):
            x = read(batch.to(model.unembed.device)).cpu()
            yield from zip(batch.order, x.split(batch.lengths.tolist()), strict=True)
            bar.update(len(batch.lines))


def logps_and_logits(hidden: Tensor, unembed: Tensor, targets: Tensor, softcap=None) -> Tensor:
    """(N, 2): log-probability and logit of each target."""
    logps = token_logps(hidden, unembed, targets, softcap=softcap)
    return torch.stack([logps, target_logits(hidden, unembed, targets, softcap=softcap)], -1)
