"""The flat batch that every loss takes: the response tokens, one after another, without padding.

Shapes: N tokens, R responses, P pairs; B rows of T positions where a batch comes padded.
Needs torch alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Responses:
    """The response tokens of a batch, flat.

    logps (N,): log-probability of each response token under the policy.
    ref_logps (N,) or None: the same under the reference; never differentiated.
    owner (N,) int64: the response each token belongs to.
    preferred (R,) bool: whether a response is a preferred one (s = +1).
    pairs (P, 2) int64: (chosen, rejected) response indices; (0, 2) where nothing is paired.

    A trainer that reads a step in parts passes two more, so that the parts' losses add up:
    whole_lengths (R,): each response's length, where not all of its tokens are here.
    step_examples: how many examples the whole step has, where not all of them are here.

    Raises ValueError for shapes or types that do not fit. On a CPU also for a response without
    tokens, a log-probability above 0, or a pair that is not (preferred, dispreferred); elsewhere
    looking would wait for the device.
    """

    logps: Tensor
    ref_logps: Tensor | None
    owner: Tensor
    preferred: Tensor
    pairs: Tensor
    whole_lengths: Tensor | None = None
    step_examples: int | None = None

    def __post_init__(self):
        N, ref = self.logps.shape, self.ref_logps
        if self.logps.dim() != 1 or not self.logps.is_floating_point():
            given = _describe(self.logps)
            raise ValueError(f"logps must be a flat floating-point tensor (N,), not {given}")
        if ref is not None and (ref.shape != N or not ref.is_floating_point()):
            raise ValueError(f"ref_logps must be like logps {tuple(N)}, not {_describe(ref)}")
        if self.owner.shape != N or self.owner.dtype != torch.int64:
            given = _describe(self.owner)
            raise ValueError(
                f"owner must be int64 {tuple(N)}, one response index per token, not {given}"
            )
        if self.preferred.dim() != 1 or self.preferred.dtype != torch.bool:
            raise ValueError(f"preferred must be bool (R,), not {_describe(self.preferred)}")
        flat = self.pairs.dim() != 2 or self.pairs.shape[1] != 2
        if flat or self.pairs.dtype != torch.int64:
            given = _describe(self.pairs)
            raise ValueError(
                f"pairs must be int64 (P, 2), (0, 2) where nothing is paired, not {given}"
            )
        if self.logps.device.type == "cpu":
            self._check_values()

    def _check_values(self):
        R = len(self.preferred)
        for name in ("owner", "pairs"):
            index = getattr(self, name)
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < R:
                raise ValueError(f"{name} holds a response index outside 0..{R - 1}")
        counts = torch.bincount(self.owner, minlength=R)
        if R and self.whole_lengths is None and not counts.all():
            raise ValueError(
                f"response {int(counts.argmin())} has no tokens; a loss needs at least one"
            )
        chosen, rejected = self.preferred[self.pairs].unbind(1)
        if not bool(chosen.all()) or bool(rejected.any()):
            raise ValueError(
                "each row of pairs must be (a preferred response, a dispreferred response)"
            )
        for name in ("logps", "ref_logps"):
            x = getattr(self, name)
            # what is less than 1e-2 above 0 is rounding
            if x is not None and x.numel() and float(x.detach().max()) > 1e-2:
                largest = float(x.detach().max())
                raise ValueError(f"{name} holds {largest:.4g}: a log-probability is at most 0")

    @classmethod
    def from_padded(cls, logps, ref_logps, mask, preferred, pairs=None) -> "Responses":
        """From padded rows.

        logps (B, T), ref_logps (B, T) or None, mask (B, T) bool: True on response tokens,
        preferred (B,) bool, pairs (P, 2) int64 or None. What stands where mask is False is never
        read (it may be NaN), and its gradient is 0. Raises ValueError as the class does.
        """
        for name, x in {"logps": logps, "ref_logps": ref_logps}.items():
            if x is not None and (x.dim() != 2 or x.shape != mask.shape):
                shapes = f"{tuple(x.shape)} and mask {tuple(mask.shape)}"
                raise ValueError(f"{name} {shapes} must both be (B, T)")
        if preferred.shape != mask.shape[:1]:
            given, wanted = tuple(preferred.shape), mask.shape[0]
            raise ValueError(f"preferred must be ({wanted},), one per response, not {given}")
        # where the response tokens stand; the one wait for the device
        tokens = mask.bool().flatten().nonzero()[:, 0]
        if pairs is None:
            pairs = torch.empty(0, 2, dtype=torch.int64, device=logps.device)
        ref = None if ref_logps is None else ref_logps.flatten()[tokens]
        return cls(logps.flatten()[tokens], ref, tokens // mask.shape[1], preferred, pairs)

    def lengths(self) -> Tensor:
        """(R,): the number of tokens of each response, in the dtype of logps."""
        if self.whole_lengths is not None:
            return self.whole_lengths.to(self.logps.dtype)
        return self.sums(torch.ones_like(self.logps))

    def sums(self, x: Tensor) -> Tensor:
        """(N,) -> (R,): the sum over each response's tokens."""
        return x.new_zeros(len(self.preferred)).index_add(0, self.owner, x)

    def unpaired(self) -> Tensor:
        """(R,) bool: the responses in no pair."""
        return torch.ones_like(self.preferred).index_fill(0, self.pairs.flatten(), False)

    def examples(self) -> Tensor | int:
        """E, the number of examples; a tensor where it is counted, so as not to wait for it."""
        if self.step_examples is not None:
            return self.step_examples
        return self.unpaired().sum() + len(self.pairs)

    def mean(self, losses: Tensor) -> Tensor:
        """The mean of one loss per example; of a step in parts, this part's share of its mean."""
        return losses.sum() / (self.step_examples or len(losses))


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
