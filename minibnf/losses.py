"""Alignment losses as functions of token log-probabilities, each with its gradient derived by hand.

Shapes: N tokens, R responses, P pairs, E examples. Everything is flat: token i belongs to response owner[i].
Letters: p = exp(logps) under the policy, r = exp(ref_logps) under the frozen reference, o(p) = p / (1 - p) the odds,
s = +1 for a preferred response and -1 for a dispreferred one, S = sum and a = mean of a response's token log-probabilities.
Units: nats. The loss of a batch is the mean over its E examples; an example is a pair, or a response in no pair.

No loss here knows of logits. Because d log p_y / dz_v = 1[v = y] - p_v, one chain rule serves them all:

    dL/dz_v = dlogps * (1[v = y] - p_v)          dlogps = dL/dlog p_y, the hand-derived part

Needs torch alone. Source of BNF: Mao et al., "As Simple as Fine-tuning: LLM Alignment via Bidirectional Negative
Feedback Loss", ICLR 2025, arXiv 2410.04834.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- the flat batch


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
            raise ValueError(f"logps must be a flat floating-point tensor (N,), not {_describe(self.logps)}")
        if ref is not None and (ref.shape != N or not ref.is_floating_point()):
            raise ValueError(f"ref_logps must be like logps {tuple(N)}, not {_describe(ref)}")
        if self.owner.shape != N or self.owner.dtype != torch.int64:
            raise ValueError(f"owner must be int64 {tuple(N)}, one response index a token, not {_describe(self.owner)}")
        if self.preferred.dim() != 1 or self.preferred.dtype != torch.bool:
            raise ValueError(f"preferred must be bool (R,), not {_describe(self.preferred)}")
        if self.pairs.dim() != 2 or self.pairs.shape[1] != 2 or self.pairs.dtype != torch.int64:
            raise ValueError(f"pairs must be int64 (P, 2), (0, 2) where nothing is paired, not {_describe(self.pairs)}")
        if self.logps.device.type == "cpu":
            self._check_values()

    def _check_values(self):
        R = len(self.preferred)
        for name, index in (("owner", self.owner), ("pairs", self.pairs)):
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < R:
                raise ValueError(f"{name} holds a response index outside 0..{R - 1}")
        if R and not (counts := torch.bincount(self.owner, minlength=R)).all():
            raise ValueError(f"response {int(counts.argmin())} has no tokens; a loss needs at least one")
        if not bool(self.preferred[self.pairs[:, 0]].all()) or bool(self.preferred[self.pairs[:, 1]].any()):
            raise ValueError("each row of pairs must be (a preferred response, a dispreferred response)")
        for name, x in (("logps", self.logps), ("ref_logps", self.ref_logps)):
            if x is not None and x.numel() and float(x.detach().max()) > 1e-2:  # below that it is rounding
                raise ValueError(f"{name} holds {float(x.detach().max()):.4g}: a log-probability is at most 0")

    @classmethod
    def from_padded(cls, logps, ref_logps, mask, preferred, pairs=None) -> "Responses":
        """From logps (B, T), ref_logps (B, T) or None, mask (B, T) bool (True on response tokens), preferred (B,) bool.

        What stands where mask is False is never read (it may be NaN), and its gradient is 0.
        """
        for name, x in (("logps", logps), ("ref_logps", ref_logps)):
            if x is not None and (x.dim() != 2 or x.shape != mask.shape):
                raise ValueError(f"{name} {tuple(x.shape)} and mask {tuple(mask.shape)} must both be (B, T)")
        if preferred.shape != mask.shape[:1]:
            raise ValueError(f"preferred must be ({mask.shape[0]},), one a response, not {tuple(preferred.shape)}")
        mask = mask.bool()
        if not bool((filled := mask.any(1)).all()):
            raise ValueError(f"response {int(filled.int().argmin())} has no tokens: its row of mask is all False")
        owner = mask.nonzero()[:, 0]
        pairs = torch.empty(0, 2, dtype=torch.int64, device=logps.device) if pairs is None else pairs
        return cls(logps[mask], None if ref_logps is None else ref_logps[mask], owner, preferred.bool(), pairs)

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


# ------------------------------------------------------------------------------- losses whose tokens do not couple
# L = Σ_i c_i Φ(log p_i): a coefficient that depends on lengths and labels only, times a potential of the one token.
# dlogps_i = c_i w_i with w = dΦ/dlog p. Because no token waits for another, value and gradient come out of a single
# sweep over chunks of tokens (logprob.one_sweep).


def coefficients(responses: Responses, length: str | float, only_preferred: bool = False) -> Tensor:
    """(N,): c_i = -s / (|y| E), the sign, length normaliser and mean over examples of each token.

    length says what |y| is:
      "own"      each response's own length;
      "shorter"  the shorter length of a pair for both its responses (BNF as published); an unpaired response's own;
      "batch"    the mean length of the batch's responses, so that every token of a batch weighs the same;
      a number   that number (a trainer passes the whole batch's mean length to each micro-batch).
    A response in several pairs counts once in each. The paper's released code divides by the shortest response of the
    whole micro-batch, which makes the loss depend on how a batch was split; that is not followed here.
    """
    n = responses.lengths()  # (R,)
    if length == "own" or length == "shorter":
        pair_n = n[responses.pairs]  # (P, 2)
        if length == "shorter":
            pair_n = pair_n.amin(1, keepdim=True).expand(-1, 2)
        c = responses.unpaired() / n
        c = c.index_add(0, responses.pairs.flatten(), 1 / pair_n.flatten())
    else:
        counts = responses.unpaired().to(n.dtype)
        counts = counts.index_add(0, responses.pairs.flatten(), n.new_ones(responses.pairs.numel()))
        c = counts / (n.mean() if length == "batch" else length)
    if only_preferred:
        c = torch.where(responses.preferred, -c, 0.0)
    else:
        c = torch.where(responses.preferred, -c, c)
    return (c / responses.examples())[responses.owner]


def bnf_potential(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Φ(p), elementwise: BNF's closed-form potential (theory.md, Identity 2), free of stop-gradients.

    The paper's target q(y) = min(p/r, 1) is held constant when differentiating; the field of gradients it makes is
    conservative, so it has a potential, continuous with its first derivative at p = r:

        p >= r    Φ = log p
        p <  r    Φ = log r + (log(1-r) - log(1-p)) / o(r)

    Below the reference, put (1-p)/(1-r) = 1 + (r-p)/(1-r) = 1 + o(r) u with u = 1 - p/r = -expm1(log p - log r):

        Φ = log r - log1p(o(r) u) / o(r) = log r - u h(u/E)      h(x) = log1p(x)/x     E = 1/o(r) = expm1(-log r)

    In this form nothing cancels, for log-probabilities from 0 to where exp underflows: h(0) = 1 is the limit of a tiny r
    (E = inf), h(inf) = 0 that of r = 1 (E = 0, Φ = 0). From the reference down Φ falls by at most one nat.
    """
    below, d, x = _below_reference(logps, ref_logps)
    middle = (x > 0) & (x < torch.inf)
    x_safe = torch.where(middle, x, 1.0)  # autograd makes NaN of the infinite slope of a branch it does not take
    h = torch.where(middle, torch.log1p(x_safe) / x_safe, torch.where(x > 0, 0.0, 1.0))
    return torch.where(below, ref_logps + torch.expm1(d) * h, logps)


def bnf_weight(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """w = dΦ/dlog p = min(1, o(p)/o(r)), elementwise: supervised fine-tuning's gradient times this is BNF's.

    Above the reference Φ = log p, so w = 1. Below, differentiate log r - log1p(o(r) u)/o(r), with du/dlog p = -p/r:

        w = (p/r) / (1 + o(r) u) = (p/r) (1-r)/(1-p) = o(p)/o(r)

    which is (q(y) - p)/(1 - p) of the paper's target (Identity 1): its gradient in z_v is -(s/|y|) w (1[v=y] - π_v).
    The released code adds 1e-6 to two denominators, which halves the gradient at p = r = 1e-6; here there is no epsilon.
    """
    below, d, x = _below_reference(logps, ref_logps)
    return torch.where(below, torch.exp(d) / (1 + x), 1.0)


def _below_reference(logps: Tensor, ref_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether p < r; log(p/r) there (0 elsewhere); and x = o(r) u = (r - p)/(1 - r), in [0, inf]."""
    below = logps < ref_logps
    d = torch.where(below, logps - ref_logps, 0.0)
    E = torch.expm1(-ref_logps.clamp(max=0))  # 1/o(r); a log r that was rounded above 0 counts as 0
    certain = E < torch.finfo(E.dtype).tiny  # r = 1
    x = torch.where(certain & below, torch.inf, -torch.expm1(d) / torch.where(certain, 1.0, E))
    return below, d, x


def _log_likelihood(logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """Φ = log p: the potential of maximum likelihood, whose push 1 - p on the logit grows as p falls, without end."""
    return logps


def _one(logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """dΦ/dlog p = 1."""
    return torch.ones_like(logps)


# ---------------------------------------------------------------------------------------------- losses that couple


def dpo_value(responses: Responses, beta: float, lam: float) -> Tensor:
    """-log σ(β Δ) - λ a_w, the mean over pairs; Δ = (S_w - S_ref,w) - (S_l - S_ref,l), summed over tokens.

    Rafailov et al. 2023, arXiv 2305.18290, equation 7; λ > 0 adds the chosen response's mean negative log-likelihood
    (iterative RPO, Pang et al. 2024, arXiv 2404.19733, equation 1).
    """
    delta, a_w = _margin(responses), _mean_of_chosen(responses)
    return (-F.logsigmoid(beta * delta) - lam * a_w).mean()


def dpo_gradient(responses: Responses, beta: float, lam: float) -> Tensor:
    """d(-log σ(x))/dx = -σ(-x) and dΔ/dlog p = ±1, so a chosen token has -β σ(-βΔ) and a rejected one the opposite;

    the second term adds -λ/|y_w| to a chosen token. One number a pair: every token of a response is pushed alike, and
    until the margin Δ grows, however improbable a rejected token has become (unidirectional feedback).
    """
    push = beta * torch.sigmoid(-beta * _margin(responses))  # (P,)
    nll = lam / responses.lengths()[responses.pairs[:, 0]]
    return _spread(responses, -push - nll, push) / len(responses.pairs)


def _margin(responses: Responses) -> Tensor:
    shift = responses.sums(responses.logps - responses.ref_logps)  # (R,): S - S_ref
    return shift[responses.pairs[:, 0]] - shift[responses.pairs[:, 1]]


def _mean_of_chosen(responses: Responses) -> Tensor:
    return (responses.sums(responses.logps) / responses.lengths())[responses.pairs[:, 0]]


def _spread(responses: Responses, chosen: Tensor, rejected: Tensor) -> Tensor:
    """(P,), (P,) -> (N,): each pair's two numbers to the tokens of its responses (added up where pairs share one)."""
    both = torch.stack([chosen, rejected], 1).flatten()
    return both.new_zeros(len(responses.preferred)).index_add(0, responses.pairs.flatten(), both)[responses.owner]


# ------------------------------------------------------------------------------------------------------- the family


@dataclass(frozen=True)
class Loss:
    """One loss: `loss(responses, **hyper)` is a scalar, differentiable through responses.logps by `gradient`.

    `value` is the same scalar in plain torch operations, `gradient` the hand-derived dL/dlogps (N,). defaults holds the
    hyper-parameters with their papers' recommended values. potential, slope and token_coefficients are there where
    tokens do not couple (see one_sweep in logprob.py). learning_rate is the trainer's default.
    Raises ValueError for an unknown or impossible hyper-parameter, missing reference, or missing pairs.
    """

    name: str
    defaults: dict
    needs_ref: bool
    needs_pairs: bool
    learning_rate: float
    value_of: Callable | None = None
    gradient_of: Callable | None = None
    token_coefficients: Callable | None = None  # (responses, **hyper) -> (N,): c
    potential: Callable | None = None  # (logps, ref_logps) -> Φ, elementwise
    slope: Callable | None = None  # (logps, ref_logps) -> w = dΦ/dlog p, elementwise

    @property
    def couples(self) -> bool:
        """Whether a token's gradient depends on other tokens, so that it cannot be made in one sweep."""
        return self.potential is None

    def __call__(self, responses: Responses, **hyper) -> Tensor:
        responses, hyper = self.prepare(responses, hyper)
        return _HandDerived.apply(responses.logps, self, responses, hyper)

    def value(self, responses: Responses, **hyper) -> Tensor:
        responses, hyper = self.prepare(responses, hyper)
        return self._value(responses, hyper)

    def gradient(self, responses: Responses, **hyper) -> Tensor:
        responses, hyper = self.prepare(responses, hyper)
        return self._gradient(responses, hyper)

    def _value(self, responses, hyper):
        if self.couples:
            return self.value_of(responses, **hyper)
        phi = self.potential(responses.logps, responses.ref_logps)
        return (self.token_coefficients(responses, **hyper) * phi).sum()

    def _gradient(self, responses, hyper):
        with torch.no_grad():
            if self.couples:
                return self.gradient_of(responses, **hyper)
            w = self.slope(responses.logps, responses.ref_logps)
            return self.token_coefficients(responses, **hyper) * w

    def hyper(self, given: dict) -> dict:
        """The defaults, overridden by what is given. Raises ValueError for what this loss does not have or allow."""
        if unknown := sorted(set(given) - set(self.defaults)):
            has = ", ".join(self.defaults) or "none"
            raise ValueError(f"loss '{self.name}' has no hyper-parameter '{unknown[0]}' (it has: {has})")
        merged = {**self.defaults, **given}
        for name, x in merged.items():
            if name == "length" and x in ("shorter", "own", "batch"):
                continue
            number = isinstance(x, (int, float)) and not isinstance(x, bool)
            if not number or not x < float("inf") or x < 0 or (x == 0 and name in ("beta", "length")):
                wanted = {"length": "'shorter', 'own', 'batch' or a number above 0", "beta": "a number above 0"}
                wanted = wanted.get(name, "a number, 0 or more")
                raise ValueError(f"loss '{self.name}': {name}={x!r} must be {wanted}")
        return merged

    def prepare(self, responses: Responses, hyper: dict) -> tuple[Responses, dict]:
        """Check that this loss can be computed on these responses; half-precision log-probabilities become float32."""
        hyper = self.hyper(hyper)
        logps, ref = responses.logps, responses.ref_logps
        if len(responses.preferred) == 0:
            raise ValueError(f"loss '{self.name}': the batch holds no response")
        if self.needs_ref and ref is None:
            raise ValueError(f"loss '{self.name}' needs ref_logps, the reference model's log-probabilities of the tokens")
        if self.needs_pairs and 2 * len(responses.pairs) < len(responses.preferred):
            raise ValueError(f"loss '{self.name}' needs every response in a pair; bnf and nll also run on unpaired ones")
        dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
        ref = None if ref is None else ref.detach().to(dtype)
        if logps.dtype != dtype or ref is not responses.ref_logps:
            responses = replace(responses, logps=logps.to(dtype), ref_logps=ref)
        return responses, hyper


class _HandDerived(torch.autograd.Function):
    """Value forward, hand-derived gradient backward; nothing of the value's graph is kept."""

    @staticmethod
    def forward(ctx, logps, loss, responses, hyper):
        ctx.save_for_backward(loss._gradient(responses, hyper))
        with torch.no_grad():
            return loss._value(responses, hyper)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        (dlogps,) = ctx.saved_tensors
        return dloss * dlogps, None, None, None


def _own(responses):
    return coefficients(responses, "own")


def _own_preferred(responses):
    return coefficients(responses, "own", only_preferred=True)


_FAMILY = [
    # BNF: L = -(s/|y|) Φ(p); Mao et al. 2025, equations 4 to 6, in the closed form above
    Loss("bnf", {"length": "shorter"}, needs_ref=True, needs_pairs=False, learning_rate=2e-5,
         token_coefficients=coefficients, potential=bnf_potential, slope=bnf_weight),
    # supervised fine-tuning on the preferred responses: L = -a_w; a dispreferred one is an example with loss 0
    Loss("nll", {}, needs_ref=False, needs_pairs=False, learning_rate=2e-5,
         token_coefficients=_own_preferred, potential=_log_likelihood, slope=_one),
    # naive unlikelihood: L = -s a, without any feedback; the control that collapses
    Loss("unlikelihood", {}, needs_ref=False, needs_pairs=False, learning_rate=2e-6,
         token_coefficients=_own, potential=_log_likelihood, slope=_one),
    Loss("dpo", {"beta": 0.1, "lam": 0.0}, needs_ref=True, needs_pairs=True, learning_rate=5e-6,
         value_of=dpo_value, gradient_of=dpo_gradient),
]  # fmt: skip
LOSSES = {loss.name: loss for loss in _FAMILY}


def bnf_loss(policy_logps, ref_logps, mask, preferred, pairs=None) -> Tensor:
    """BNF for somebody else's training loop: the scalar loss of a padded batch, ready for .backward().

    policy_logps (B, T): log-probability of each token under the model in training, with its graph.
    ref_logps (B, T): the same under the frozen reference, without a graph.
    mask (B, T) bool: True on response tokens.  preferred (B,) bool.  pairs (P, 2) int64: (chosen, rejected) rows.
    Without pairs every response is an example of its own, divided by its own length; with pairs both responses of a
    pair are divided by the shorter length, as published. Raises ValueError where the shapes do not fit.
    """
    return LOSSES["bnf"](Responses.from_padded(policy_logps, ref_logps, mask, preferred, pairs))
