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
        N, R, P = len(self.logps), len(self.preferred), len(self.pairs)
        wanted = {
            "logps": f"float ({N},)",
            "ref_logps": f"float ({N},)",
            "owner": f"int64 ({N},)",
            "preferred": f"bool ({R},)",
            "pairs": f"int64 ({P}, 2)",
        }
        for name, form in wanted.items():
            x = getattr(self, name)
            if x is not None and (found := _form(x)) != form:
                raise ValueError(f"{name} must be flat, {form}, not {found}")
        if self.logps.device.type == "cpu":
            self._check_values()

    def _check_values(self):
        R = len(self.preferred)
        counts = torch.bincount(self.owner, minlength=R)
        if len(counts) > R:
            raise ValueError(f"owner names response {len(counts) - 1}, but there are only {R}")
        if self.whole_lengths is None and not counts.all():
            raise ValueError(f"response {counts.argmin()} has no tokens; it needs at least one")
        if (self.preferred[self.pairs] != torch.tensor([True, False])).any():
            raise ValueError("each row of pairs must be (a preferred, a dispreferred response)")
        for name in ("logps", "ref_logps"):
            x = getattr(self, name)
            if x is not None and (x > 1e-2).any():  # less than that is rounding
                raise ValueError(f"{name} holds {x.max():.4g}: a log-probability is at most 0")

    @classmethod
    def from_padded(cls, logps, ref_logps, mask, preferred, pairs=None) -> "Responses":
        """From padded rows.

        logps (B, T), ref_logps (B, T) or None, mask (B, T) bool: True on response tokens,
        preferred (B,) bool, pairs (P, 2) int64 or None. What stands where mask is False is never
        read (it may be NaN), and its gradient is 0. Raises ValueError as the class does.
        """
        B, T = mask.shape
        given = {
            "logps": (logps, (B, T)),
            "ref_logps": (ref_logps, (B, T)),
            "preferred": (preferred, (B,)),
        }
        for name, (x, shape) in given.items():
            if x is not None and x.shape != shape:
                raise ValueError(f"{name} must be {shape} as mask is, not {tuple(x.shape)}")
        # where the response tokens stand; the one wait for the device
        tokens = mask.bool().flatten().nonzero()[:, 0]
        if pairs is None:
            pairs = logps.new_empty(0, 2, dtype=torch.int64)
        ref = None if ref_logps is None else ref_logps.flatten()[tokens]
        return cls(logps.flatten()[tokens], ref, tokens // T, preferred, pairs)

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


def _form(x: Tensor) -> str:
    kind = "float" if x.is_floating_point() else str(x.dtype).removeprefix("torch.")
    return f"{kind} {tuple(x.shape)}"
