"""Log-probabilities of response tokens, and the frozen reference's: computed once, before training, and cached."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from minibnf.checkpoint import write_tensors
from minibnf.data import Batch, Example, digest, pack
from minibnf.logprob import token_logps
from minibnf.model import Transformer


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
        return torch.cat([self.logps[slice(*self.start[key])] for key in batch.order]).to(batch.targets.device)


@torch.no_grad()
def reference(model: Transformer, examples: list[Example], file: Path, max_tokens: int, dtype, device) -> Reference:
    """Computed once and cached in file; a cached one is used if it belongs to these tokens, this model and this dtype."""
    fingerprint = hashlib.sha256(f"{digest(examples)} {dtype} {fingerprint_of(model)}".encode()).hexdigest()
    if file.is_file():
        with safe_open(file, framework="pt") as cached:
            if (cached.metadata() or {}).get("fingerprint") == fingerprint:
                return Reference(examples, cached.get_tensor("logps"))
    ref = Reference(examples, torch.empty(sum(len(r) for e in examples for r in e.responses)))
    with tqdm(total=len(examples), desc="reference", unit="example", disable=None, leave=False) as bar:
        for i in range(0, len(examples), 512):
            for batch in pack(examples, list(range(i, min(i + 512, len(examples)))), max_tokens):
                logps = forward_logps(model, batch.to(device), dtype).cpu()
                for key, part in zip(batch.order, logps.split(torch.bincount(batch.owner).tolist()), strict=True):
                    ref.logps[slice(*ref.start[key])] = part
                bar.update(len(batch.lines))
    write_tensors(file, {"logps": ref.logps}, {"fingerprint": fingerprint})
    return ref


def fingerprint_of(model: Transformer) -> str:
    """Tells models apart by two sums over every parameter."""
    return json.dumps([[p.double().sum().item(), p.double().square().sum().item()] for p in model.parameters()])


def forward_logps(model: Transformer, batch: Batch, dtype) -> Tensor:
    """(N,): log-probabilities of a batch's response tokens."""
    head = lambda x, unembed: token_logps(x[0, batch.predictors], unembed, batch.targets)
    return model(batch.tokens, batch.positions, batch.layout, dtype=dtype, head=head)
