"""One step, from packed batches to loss, gradients and metrics; and the frozen reference.

Shapes: N response tokens and R responses of a batch, P pairs, D width, V vocabulary.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minibnf.data import Batch, Example, pack
from minibnf.files.safetensors import read_sealed, write_tensors
from minibnf.kernels import compiling
from minibnf.logprob import chunk_tokens, cuts, sweep, token_logps
from minibnf.losses import Loss
from minibnf.machine import to_device
from minibnf.model import Transformer
from minibnf.responses import Responses

# ----------------------------------------------------------------------------------- loss, gradient


def batch_loss(
    model, batch: Batch, loss: Loss, hyper: dict, E: int, dtype
) -> tuple[Tensor, Tensor]:
    """A micro-batch's share of the step's loss, a scalar, and logps (N,), detached.

    E: how many examples the step has. dtype: what to compute in. Call backward on the loss as it
    is.
    """
    chunks = chunks_of(model, batch, loss)

    def judge(k: int, logps: Tensor) -> tuple[Tensor, Tensor]:
        """What the loss makes of the tokens in chunk k, of which logps are given."""
        i, owner, preferred = chunks[k], batch.owner[chunks[k]], batch.preferred
        pairs, lengths = batch.pairs, batch.lengths
        if not loss.token_local:  # of these rows alone
            first, first_pair = batch.starts[i.start]
            end, end_pair = batch.starts[i.stop]
            owner, preferred, lengths = owner - first, preferred[first:end], lengths[first:end]
            pairs = pairs[first_pair:end_pair] - first
        ref_logps = None if batch.ref_logps is None else batch.ref_logps[i]
        part = Responses(logps, ref_logps, owner, preferred, pairs, lengths, E)
        return loss.value(part, **hyper), loss.gradient(part, **hyper)

    return predict(model, batch, dtype, partial(sweep, chunks=chunks, judge=judge))


def batch_logps(model, batch: Batch, loss: Loss, dtype, *, training: bool = False) -> Tensor:
    """(N,): the log-probabilities that batch_loss sees, rounded alike, for the same products.

    What is compiled rounds alike in the same graph alone. training: in the one with gradients.
    """
    with torch.set_grad_enabled(training and compiling()):
        return predict(model, batch, dtype, partial(sweep, chunks=chunks_of(model, batch, loss)))[1]


def chunks_of(model: Transformer, batch: Batch, loss: Loss) -> list[slice]:
    """The response tokens in chunks that the loss can judge one by one.

    A token-local loss may be cut anywhere, others only between rows.
    """
    sizes = None if loss.token_local else [b - a for a, b in pairwise(batch.starts)]
    return cuts(sizes, len(batch.targets), chunk_tokens(model.unembed))


def predict(model: Transformer, batch: Batch, dtype, read: Callable):
    """read(hidden, unembed, targets, softcap=) of what predicts a batch's response tokens."""

    def head(x, unembed):
        cap = model.config.final_softcap
        return read(x[0, batch.predictors], unembed, batch.targets, softcap=cap)

    return model(batch.tokens, batch.positions, batch.layout, dtype=dtype, head=head)


def run_batches(
    model: Transformer, batches: list[Batch], loss: Loss, hyper: dict, dtype, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """A step's loss over all its micro-batches, and what its responses sum to.

    Returns the loss, a scalar whose gradients are accumulated if backward, and the R responses'
    log-likelihoods (1, R), with a reference also how far these have shifted from it (2, R), in
    nats. Nothing here waits for the device.
    """
    values, sums = [], []
    E = sum(len(b.preferred) if loss.per_response else b.examples for b in batches)
    if hyper.get("length") == "batch":  # the mean of the whole step, whatever a micro-batch holds
        tokens = sum(len(b.targets) for b in batches)
        hyper = hyper | {"length": tokens / sum(len(b.preferred) for b in batches)}
    for batch in batches:
        batch = batch.to(model.unembed.device)
        with torch.set_grad_enabled(backward):
            value, logps = batch_loss(model, batch, loss, hyper, E, dtype)
        if backward:
            value.backward()
        values.append(value.detach())
        found = [logps] if batch.ref_logps is None else [logps, logps - batch.ref_logps]
        responses = batch.responses(logps, batch.ref_logps)
        sums.append(torch.stack([responses.sums(x) for x in found]))
    return torch.stack(values).sum(), torch.cat(sums, 1)


def kl_estimate(model: Transformer, batches: list[Batch], loss: Loss, dtype) -> Tensor:
    """KTO's reference point z0, a scalar in nats.

    max(0, the mean over mismatched responses of how far their log-likelihood has shifted).
    """
    hyper = loss.hyper({"kl": 0.0})  # the loss itself is not asked for
    _, (_, shifts) = run_batches(model, batches, loss, hyper, dtype, backward=False)
    return shifts.mean().clamp(min=0)


def metrics(batches: list[Batch], sums: Tensor, beta: float) -> dict[str, Tensor]:
    """TRL's names, from run_batches' sums, as scalars on their device; absent where undefined.

    logps: log-likelihoods of whole responses in nats. rewards: beta (1 where a loss has none) times
    the shift against the reference; margins and accuracies are over pairs. Waits for nothing.
    """
    preferred = torch.cat([b.preferred for b in batches])
    sides = {"chosen": preferred.nonzero()[:, 0], "rejected": (~preferred).nonzero()[:, 0]}
    values = {"logps": sums[0]}
    if len(sums) > 1:
        values["rewards"] = beta * sums[1]
    found = {}
    for name, x in values.items():
        for side, responses in sides.items():
            if len(responses):
                found[f"{name}/{side}"] = x[to_device(responses, x.device)].mean()
    starts = accumulate((len(b.preferred) for b in batches), initial=0)
    pairs = torch.cat([b.pairs + at for at, b in zip(starts, batches, strict=False)])
    if "rewards" in values and len(pairs):
        chosen, rejected = sums[1][to_device(pairs, sums.device)].unbind(1)
        margins = beta * (chosen - rejected)
        found["rewards/margins"] = margins.mean()
        found["rewards/accuracies"] = (margins > 0).float().mean()
    return found


# ------------------------------------------------------------------------------------ the reference


def with_reference(
    model, examples: list[Example], steps: Iterable[list[Batch]], file: Path, loss, dtype,
    training: bool = False,
) -> list[Example]:  # fmt: skip
    """The examples with the model's log-probabilities, computed once and cached in file.

    training: whether they will be trained on, or only be read. steps: the examples as training
    will meet them, lists of packed batches. A product of other sizes may round otherwise, so only
    where the reference is read in the same packs and chunks do policy and reference agree before
    the first step. A cache that is damaged is made again.
    """
    sizes = [len(response) for e in examples for response in e.responses]
    seal = f"reference of {sum(sizes)} tokens"
    try:
        logps = read_sealed(file, seal)["logps"]
    except (OSError, ValueError):  # it is not there, or damaged
        read = partial(batch_logps, model, loss=loss, dtype=dtype, training=training)
        logps = torch.cat(read_all(model, examples, steps, read, "reference")).float()
        write_tensors(file, {"logps": logps}, seal=seal)
    parts = iter(logps.split(sizes))
    return [e._replace(ref_logps=tuple(islice(parts, len(e.responses)))) for e in examples]


# ------------------------------------------------------------------------- reading any responses


def read_responses(model, examples, max_tokens=4096, read=token_logps) -> list[Tensor]:
    """What `read` makes of every response token: a tensor per response, on the CPU, in order.

    read(hidden, unembed, targets, softcap=): its log-probability (token_logps), its logit
    (feedback.target_logits), or what else it makes.
    """
    places = list(range(len(examples)))
    steps = (pack(examples, places[at : at + 512], max_tokens) for at in places[::512])
    read_batch = partial(predict, model, dtype=None, read=read)
    return read_all(model, examples, steps, read_batch, "reading")


@torch.no_grad()
def read_all(model, examples: list[Example], steps, read, desc: str) -> list[Tensor]:
    """Of each response its part of read(batch), on the CPU, in the order of the examples.

    steps: lists of packed batches in which every example is met once.
    """
    found = {}  # by place: (index of the example, index in it)
    with tqdm(total=len(examples), desc=desc, unit="row", disable=None, leave=False) as bar:
        for batch in chain.from_iterable(steps):
            x = read(batch.to(model.unembed.device)).cpu()
            found.update(zip(batch.order, x.split(batch.lengths.tolist()), strict=True))
            bar.update(len({i for i, _ in batch.order}))
    return [found[place] for place in sorted(found)]
