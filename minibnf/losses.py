"""Alignment losses as functions of token log-probabilities, each with its gradient derived by hand.

Shapes: N tokens, R responses, P pairs, E examples. Everything is flat: token i belongs to response
owner[i].
Letters: p = exp(logps) under the policy, r = exp(ref_logps) under the frozen reference,
o(p) = p / (1 - p) the odds, s = +1 for a preferred response and -1 for a dispreferred one. Of a
response y, |y| is the length, S the sum and a = S/|y| the mean of its log-probabilities. w and l
mark a pair's chosen and rejected response. σ is the logistic function.
Units: nats. The loss of a batch is the mean over its E examples; an example is a pair, or a
response in no pair (for kto each response). A pair's token-local loss is the sum of its two
responses'.

No loss here knows of logits. Because d log p_y / dz_v = 1[v = y] - p_v, one chain rule serves all:

    dL/dz_v = dlogps * (1[v = y] - p_v)          dlogps = dL/dlog p_y, the part derived by hand

Needs torch alone. Source of BNF: Mao et al., "As Simple as Fine-tuning: LLM Alignment via
Bidirectional Negative Feedback Loss", ICLR 2025, arXiv 2410.04834. Those it is compared with stand
in rivals.py. To add a loss, write its value and its gradient and enter them in LOSSES at the end of
this file (CONTRIBUTING.md shows one).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minibnf import rivals
from minibnf.responses import Responses

# ---------------------------------------------------------------- losses whose tokens do not couple
# L = Σ_i c_i Φ(log p_i): a coefficient that depends on lengths and labels only, times a potential
# of the one token. dlogps_i = c_i w_i with w = dΦ/dlog p. No token waits for another.


def coefficients(responses: Responses, length: str | float) -> Tensor:
    """(N,): c_i = -s / (|y| E), the sign, length normaliser and mean over examples of each token.

    length says what |y| is:
      "own"      each response's own length;
      "shorter"  the shorter length of a pair for both its responses (BNF as published); an
                 unpaired response's own;
      "batch"    the mean length of the batch's responses, so that all tokens weigh the same;
      a number   that number (a trainer passes the whole step's mean length to each part).
    A response in several pairs counts once in each. The paper's released code divides by the
    shortest response of the whole micro-batch, which makes the loss depend on how a batch was
    split; that is not followed here.
    """
    n = responses.lengths()  # (R,)
    if length == "batch":
        n = n.mean().expand_as(n)
    elif length not in ("own", "shorter"):
        n = torch.full_like(n, length)
    pair_n = n[responses.pairs]  # (P, 2)
    if length == "shorter":
        pair_n = pair_n.amin(1, keepdim=True).expand(-1, 2)
    paired = responses.pairs.flatten()  # (2P,)
    c = (responses.unpaired() / n).index_add(0, paired, 1 / pair_n.flatten())
    c = torch.where(responses.preferred, -c, c) / responses.examples()
    return c[responses.owner]


def bnf_potential(logps: Tensor, ref_logps: Tensor, preferred: Tensor | None = None) -> Tensor:
    """Φ(p), elementwise: BNF's closed-form potential, free of stop-gradients (identity 2).

    The paper's target q(y) = min(p/r, 1) is held constant when differentiating. The field of
    gradients that it makes is conservative, so it has a potential, continuous with its first
    derivative at p = r:

        p >= r    Φ = log p
        p <  r    Φ = log r + (log(1-r) - log(1-p)) / o(r)

    Below the reference, put u = 1 - p/r = -expm1(log p - log r), so that
    (1-p)/(1-r) = 1 + (r-p)/(1-r) = 1 + o(r) u:

        Φ = log r - log1p(o(r) u) / o(r) = log r - u h(u/E)
        h(x) = log1p(x)/x          E = 1/o(r) = expm1(-log r)

    In this form nothing cancels, for log-probabilities from 0 to where exp underflows. h(0) = 1 is
    the limit of a tiny r (E = inf), h(inf) = 0 that of r = 1 (E = 0, Φ = 0). From the reference
    down, Φ falls by at most one nat.
    """
    below, d, x = _below_reference(logps, ref_logps)
    return torch.where(below, ref_logps + torch.expm1(d) * _log1p_over(x), logps)


def bnf_weight(logps: Tensor, ref_logps: Tensor, preferred: Tensor | None = None) -> Tensor:
    """w = dΦ/dlog p = min(1, o(p)/o(r)), elementwise. Fine-tuning's gradient times this is BNF's.

    Above the reference Φ = log p, so w = 1. Below, differentiate log r - log1p(o(r) u)/o(r), with
    du/dlog p = -p/r:

        w = (p/r) / (1 + o(r) u) = (p/r) (1-r)/(1-p) = o(p)/o(r)

    This is (q(y) - p)/(1 - p) of the paper's target (identity 1): its gradient in z_v is
    -(s/|y|) w (1[v=y] - π_v). The released code adds 1e-6 to two denominators, which halves the
    gradient at p = r = 1e-6; here there is no epsilon.
    """
    below, d, x = _below_reference(logps, ref_logps)
    return torch.where(below, torch.exp(d) / (1 + x), 1.0)


def rbnf_potential(logps: Tensor, ref_logps: Tensor, preferred: Tensor) -> Tensor:
    """BNF with retrieval, this project's own: a preferred token's Φ has the slope max(r, w).

    BNF's w = o(p)/o(r) meets r at p*, where o(p*) = r o(r), so p* = r² / (1 - r + r²). From there
    down, Φ goes on with slope r:  Φ = Φ_bnf(p*) + r (log p - log p*).
    With y = r (1-r), 1 - r + r² = 1 - y and h2 = -log1p(-y)/y:

        log p* = 2 log r + y h2        Φ_bnf(p*) = log r + log1p(-y)/o(r) = log r - (1-r)² h2
    """
    r, one_minus_r = torch.exp(ref_logps), -torch.expm1(ref_logps)
    y = r * one_minus_r
    h2 = _log1p_over(-y)
    star = 2 * ref_logps + y * h2
    retrieved = ref_logps - one_minus_r.square() * h2 + r * (logps - star)
    return torch.where(preferred & (logps < star), retrieved, bnf_potential(logps, ref_logps))


def rbnf_weight(logps: Tensor, ref_logps: Tensor, preferred: Tensor) -> Tensor:
    """max(r, w) for a preferred token, w for a dispreferred one.

    So a preferred token is pulled back from far below with the reference's own confidence. It is
    dΦ/dlog p of rbnf_potential: w above p* (where w >= r), r below it.
    """
    w = bnf_weight(logps, ref_logps)
    return torch.where(preferred, torch.maximum(w, torch.exp(ref_logps)), w)


def _below_reference(logps: Tensor, ref_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether p < r; log(p/r) there, else 0; and x = o(r) u = (r - p)/(1 - r), in [0, inf]."""
    below = logps < ref_logps
    d = torch.where(below, logps - ref_logps, 0.0)
    E = torch.expm1(-ref_logps)  # 1/o(r)
    certain = E < torch.finfo(E.dtype).tiny  # r = 1, or rounded above it
    x = -torch.expm1(d) / torch.where(certain, 1.0, E)
    return below, d, torch.where(certain & below, torch.inf, x)


def _log1p_over(x: Tensor) -> Tensor:
    """log1p(x)/x with its limits, 1 at 0 and 0 at inf; x > -1."""
    middle = (x != 0) & (x < torch.inf)
    # autograd makes NaN of the infinite slope of a branch that is not taken
    x_safe = torch.where(middle, x, 1.0)
    limits = torch.where(x == 0, 1.0, 0.0)
    return torch.where(middle, torch.log1p(x_safe) / x_safe, limits)


def nll_potential(logps: Tensor, ref_logps: Tensor | None, preferred: Tensor) -> Tensor:
    """Supervised fine-tuning on preferred responses: Φ = log p, and 0 for a dispreferred one.

    A dispreferred response still counts as an example.
    """
    return torch.where(preferred, logps, 0.0)


def nll_weight(logps: Tensor, ref_logps: Tensor | None, preferred: Tensor) -> Tensor:
    """dΦ/dlog p = 1 where preferred."""
    return preferred.to(logps.dtype)


def unlikelihood_potential(logps: Tensor, ref_logps: Tensor | None, preferred: Tensor) -> Tensor:
    """Φ = log p for both kinds, without any feedback: the control that collapses.

    Minimising +log p has no end. (Welleck et al. 2020, arXiv 1908.04319, minimise -log(1 - p)
    instead, which is bounded below.)
    """
    return logps


def unlikelihood_weight(logps: Tensor, ref_logps: Tensor | None, preferred: Tensor) -> Tensor:
    """dΦ/dlog p = 1: the push on the logit, 1 - p, grows as p falls."""
    return torch.ones_like(logps)


# --------------------------------------------------------------------------------------- the family


@dataclass(frozen=True)
class Loss:
    """One loss: `loss(responses, **hyper)` is a scalar whose gradient is the hand-derived one.

    value_of(responses, **hyper): the scalar in plain torch operations, which autograd can
    differentiate. gradient_of: the hand-derived dL/dlogps (N,). defaults: the hyper-parameters with
    their papers' recommended values. per_response: each response is an example, also one in a pair.
    token_local: a token's gradient depends on no other token, so a trainer may cut the batch
    anywhere. Then potential and weight are the functions that token_local() was given.
    Raises ValueError for an unknown, missing or impossible hyper-parameter, a missing reference, or
    missing pairs.
    """

    name: str
    defaults: dict
    value_of: Callable
    gradient_of: Callable
    needs_ref: bool = False
    needs_pairs: bool = False
    per_response: bool = False
    potential: Callable | None = None
    weight: Callable | None = None

    @property
    def token_local(self) -> bool:
        return self.weight is not None

    def __call__(self, responses: Responses, **hyper) -> Tensor:
        return _HandDerived.apply(responses.logps, self, responses, hyper)

    def value(self, responses: Responses, **hyper) -> Tensor:
        responses, hyper = self.prepare(responses, hyper)
        return self.value_of(responses, **hyper)

    def gradient(self, responses: Responses, **hyper) -> Tensor:
        responses, hyper = self.prepare(responses, hyper)
        with torch.no_grad():
            return self.gradient_of(responses, **hyper)

    def hyper(self, given: dict) -> dict:
        """The defaults, overridden by what is given.

        Raises ValueError for what this loss does not have or allow.
        """
        merged = {**self.defaults, **given}
        for name, x in merged.items():
            if name not in self.defaults:
                has = f"hyper-parameter '{name}' (it has: {', '.join(self.defaults)})"
                raise ValueError(f"loss '{self.name}' has no {has}")
            if isinstance(x, (int, float)):
                fits = 0 <= x < float("inf") and (x > 0 or name not in ("beta", "length"))
                fits = fits and (x <= 1 or (self.name, name) != ("bdpo", "lam"))
            elif isinstance(x, Tensor):
                fits = name == "kl"  # a trainer leaves it on its device
            else:
                fits = name == "length" and x in ("shorter", "own", "batch")
            if not fits:
                wanted = "a number from 0 to 1" if self.name == "bdpo" else "a number, 0 or more"
                wanted = _WANTED.get(name, wanted)
                raise ValueError(f"loss '{self.name}': {name}={x!r} must be {wanted}")
        return merged

    def prepare(self, responses: Responses, hyper: dict) -> tuple[Responses, dict]:
        """Check that the loss can be computed here; half precision becomes float32."""
        ref, pairs = responses.ref_logps, responses.pairs
        if self.needs_ref and ref is None:
            raise ValueError(f"loss '{self.name}' needs ref_logps, those of the reference model")
        if self.needs_pairs:
            lone = 2 * len(pairs) < len(responses.preferred)  # what shapes tell without a wait
            if lone or (pairs.device.type == "cpu" and responses.unpaired().any()):
                raise ValueError(f"loss '{self.name}' needs every response in a pair; bnf does not")
        wide = torch.promote_types(responses.logps.dtype, torch.float32)
        ref = None if ref is None else ref.detach().to(wide)
        responses = replace(responses, logps=responses.logps.to(wide), ref_logps=ref)
        return responses, self.hyper(hyper)


_WANTED = {
    "length": "'shorter', 'own', 'batch' or a number above 0",
    "beta": "a number above 0",
    "kl": "given: the detached scalar max(0, mean log-ratio of mismatched completions)",
}


class _HandDerived(torch.autograd.Function):
    """Value forward, hand-derived gradient backward; nothing of the value's graph is kept."""

    @staticmethod
    def forward(ctx, logps, loss, responses, hyper):
        ctx.save_for_backward(loss.gradient(responses, **hyper))
        return loss.value(responses, **hyper)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        (dlogps,) = ctx.saved_tensors
        return dloss * dlogps, None, None, None


def token_local(
    name: str, potential: Callable, weight: Callable, length: str, ref: bool, **hyper
) -> Loss:
    """The Loss Σ_i c_i Φ(log p_i) of a potential Φ and its slope w, both elementwise functions of
    (logps, ref_logps, preferred), all (N,), and of hyper-parameters. length and hyper: their
    defaults; ref: whether it needs a reference.
    """

    def value(responses: Responses, length: str | float, **hyper) -> Tensor:
        kind = responses.preferred[responses.owner]
        phi = potential(responses.logps, responses.ref_logps, kind, **hyper)
        return (coefficients(responses, length) * phi).sum()

    def gradient(responses: Responses, length: str | float, **hyper) -> Tensor:
        kind = responses.preferred[responses.owner]
        w = weight(responses.logps, responses.ref_logps, kind, **hyper)
        return coefficients(responses, length) * w

    defaults = {"length": length, **hyper}
    return Loss(name, defaults, value, gradient, ref, potential=potential, weight=weight)


def either(good: Loss, bad: Loss) -> Loss:
    """The token loss with good's weight on preferred tokens and bad's on dispreferred ones.

    Hyper-parameters go to the part that has them; defaults, length's too, are good's before bad's.
    """

    def by_label(part: str) -> Callable:
        def of_tokens(logps, ref_logps, preferred, **hyper) -> Tensor:
            found = []
            for loss in (good, bad):
                own = {name: x for name, x in hyper.items() if name in loss.defaults}
                found.append(getattr(loss, part)(logps, ref_logps, preferred, **own))
            return torch.where(preferred, *found)

        return of_tokens

    defaults = bad.defaults | good.defaults
    functions = by_label("potential"), by_label("weight")
    needs_ref = good.needs_ref or bad.needs_ref
    return token_local(f"{good.name}/{bad.name}", *functions, ref=needs_ref, **defaults)


def _rival(name: str, ref: bool, pairs: bool = True, **defaults) -> Loss:
    value, gradient = getattr(rivals, f"{name}_value"), getattr(rivals, f"{name}_gradient")
    return Loss(name, defaults, value, gradient, ref, needs_pairs=pairs, per_response=not pairs)


_LOSSES = [
    token_local("bnf", bnf_potential, bnf_weight, length="shorter", ref=True),
    token_local("rbnf", rbnf_potential, rbnf_weight, length="batch", ref=True),
    token_local("nll", nll_potential, nll_weight, length="own", ref=False),
    token_local(
        "unlikelihood", unlikelihood_potential, unlikelihood_weight, length="own", ref=False
    ),
    token_local("ratio", rivals.ratio_potential, rivals.ratio_weight, length="batch", ref=True),
    token_local("topr", rivals.topr_potential, rivals.topr_weight, length="batch", ref=True),
    token_local(
        "tnpo", rivals.tnpo_potential, rivals.tnpo_weight, length="batch", ref=True, beta=1.0
    ),
    token_local(
        "power", rivals.power_potential, rivals.power_weight, length="batch", ref=False, alpha=1.0
    ),
    _rival("dpo", ref=True, beta=0.1, lam=0.0),
    _rival("rdpo", ref=True, beta=0.1, alpha=0.01),
    _rival("ipo", ref=True, beta=0.1),
    _rival("slic", ref=False, delta=1.0, lam=0.1),
    _rival("kto", ref=True, pairs=False, beta=0.1, lam_d=1.0, lam_u=1.0, kl=None),
    _rival("orpo", ref=False, lam=0.1),
    _rival("simpo", ref=False, beta=2.0, gamma=1.0),
    _rival("cpo", ref=False, beta=0.1, lam=1.0),
    _rival("apo_zero", ref=True, beta=0.1),
    _rival("lndpo", ref=True, beta=5.0),
    _rival("bdpo", ref=True, beta=0.1, lam=0.5),
]


class _Losses(dict):
    """Losses by name. A name of two token-local ones, such as "rbnf/topr", makes either() of them:
    the first one's weight on preferred tokens, the second one's on dispreferred ones."""

    def __missing__(self, name: str) -> Loss:
        parts = [self.get(part) for part in name.split("/")]
        if len(parts) == 2 and all(loss and loss.token_local for loss in parts):
            return either(*parts)
        local = ", ".join(known for known in self if self[known].token_local)
        known = f"{', '.join(self)}; and two of {local}, such as bnf/topr"
        raise KeyError(f"no loss '{name}'; there are {known}")


LOSSES = _Losses((loss.name, loss) for loss in _LOSSES)


def bnf_loss(policy_logps, ref_logps, mask, preferred, pairs=None) -> Tensor:
    """BNF for somebody else's training loop: a scalar of a padded batch, ready for .backward().

    policy_logps (B, T): log-probability of each token under the model in training, with its graph.
    ref_logps (B, T): the same under the frozen reference, without a graph.
    mask (B, T) bool: True on response tokens.  preferred (B,) bool.
    pairs (P, 2) int64: (chosen, rejected) rows.
    Without pairs every response is an example of its own, divided by its own length. With pairs
    both responses of a pair are divided by the shorter length, as published.
    Raises ValueError where the shapes do not fit.
    """
    return LOSSES["bnf"](Responses.from_padded(policy_logps, ref_logps, mask, preferred, pairs))
