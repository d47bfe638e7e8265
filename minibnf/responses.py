"""The flat batch that every loss takes: the response tokens of a batch, one after another, no padding.

Shapes: N tokens, R responses, P pairs; B rows of T positions where a batch comes padded. Needs torch alone.
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

    Raises ValueError for shapes or types that do not fit and, on the CPU (elsewhere looking would wait for the device),
    for a response without tokens, a log-probability above 0, or a pair that is not (preferred, dispreferred).
    """

    logps: Tensor
    ref_logps: Tensor | None
    owner: Tensor
    preferred: Tensor
    pairs: Tensor

    def __post_init__(self):
        N, ref = self.logps.shape, self.ref_logps
        if self.logps.dim() != 1 or not self.logps.is_floating_point():
            raise ValueError(
                f"logps must be a flat floating-point tensor (N,), not {_describe(self.logps)}"
            )
        if ref is not None and (ref.shape != N or not ref.is_floating_point()):
            raise ValueError(f"ref_logps must be like logps {tuple(N)}, not {_describe(ref)}")
        if self.owner.shape != N or self.owner.dtype != torch.int64:
            raise ValueError(
                f"owner must be int64 {tuple(N)}, one response index a token, not {_describe(self.owner)}"
            )
        if self.preferred.dim() != 1 or self.preferred.dtype != torch.bool:
            raise ValueError(f"preferred must be bool (R,), not {_describe(self.preferred)}")
        if self.pairs.dim() != 2 or self.pairs.shape[1] != 2 or self.pairs.dtype != torch.int64:
            raise ValueError(
                f"pairs must be int64 (P, 2), (0, 2) where nothing is paired, not {_describe(self.pairs)}"
            )
        if self.logps.device.type == "cpu":
            self._check_values()

    def _check_values(self):
        R = len(self.preferred)
        for name, index in (("owner", self.owner), ("pairs", self.pairs)):
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < R:
                raise ValueError(f"{name} holds a response index outside 0..{R - 1}")
        if R and not (counts := torch.bincount(self.owner, minlength=R)).all():
            raise ValueError(
                f"response {int(counts.argmin())} has no tokens; a loss needs at least one"
            )
        if not bool(self.preferred[self.pairs[:, 0]].all()) or bool(
            self.preferred[self.pairs[:, 1]].any()
        ):
            raise ValueError(
                "each row of pairs must be (a preferred response, a dispreferred response)"
            )
        for name, x in (("logps", self.logps), ("ref_logps", self.ref_logps)):
            if (
                x is not None and x.numel() and float(x.detach().max()) > 1e-2
            ):  # below that it is rounding
                raise ValueError(
                    f"{name} holds {float(x.detach().max()):.4g}: a log-probability is at most 0"
                )

    @classmethod
    def from_padded(cls, logps, ref_logps, mask, preferred, pairs=None) -> "Responses":
        """From logps (B, T), ref_logps (B, T) or None, mask (B, T) bool (True on response tokens), preferred (B,) bool.

        What stands where mask is False is never read (it may be NaN), and its gradient is 0.
        """
        for name, x in (("logps", logps), ("ref_logps", ref_logps)):
            if x is not None and (x.dim() != 2 or x.shape != mask.shape):
                raise ValueError(
                    f"{name} {tuple(x.shape)} and mask {tuple(mask.shape)} must both be (B, T)"
                )
        if preferred.shape != mask.shape[:1]:
            raise ValueError(
                f"preferred must be ({mask.shape[0]},), one a response, not {tuple(preferred.shape)}"
            )
        tokens = (
            mask.bool().flatten().nonzero()[:, 0]
        )  # where the response tokens stand; the one wait for the device
        pairs = (
            torch.empty(0, 2, dtype=torch.int64, device=logps.device) if pairs is None else pairs
        )
        ref = None if ref_logps is None else ref_logps.flatten()[tokens]
        return cls(logps.flatten()[tokens], ref, tokens // mask.shape[1], preferred, pairs)

    def lengths(self) -> Tensor:
        """(R,): the number of tokens of each response, in the dtype of logps."""
        return self.sums(torch.ones_like(self.logps))

    def sums(self, x: Tensor) -> Tensor:
        """(N,) -> (R,): the sum over each response's tokens."""
        return x.new_zeros(len(self.preferred)).index_add(0, self.owner, x)

    def unpaired(self) -> Tensor:
        """(R,) bool: the responses in no pair."""
        return torch.ones_like(self.preferred).index_fill(0, self.pairs.flatten(), False)

    def examples(self) -> Tensor:
        """E, the number of examples, as a tensor (so that counting does not wait for the device)."""
        return self.unpaired().sum() + len(self.pairs)


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
