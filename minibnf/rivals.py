"""The losses that BNF is compared with: token by token ratio to power, then dpo and its kin, kto.

Letters, shapes and units as in losses.py. A loss whose tokens do not couple is a potential Φ and
its slope w = dΦ/dlog p, the others have a value in plain torch operations and a gradient
dlogps (N,) by hand. Where public implementations differ from a paper, the docstring says
so and which one is followed; "TRL" is its release 1.x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minibnf.responses import Responses

# ---------------------------------------------------------------- losses whose tokens do not couple


def ratio_potential(logps: Tensor, ref_logps: Tensor, preferred: Tensor | None = None) -> Tensor:
    """The truncated importance ratio on both kinds of tokens: Φ = log p above r and, below it,

        Φ = log r + p/r - 1        so from r to 0 it falls by 1 nat, whatever r is

    BNF with the ratio in place of the odds ratio; no paper's, but a point of the map.
    """
    d = torch.clamp(logps - ref_logps, max=0)
    return torch.where(d == 0, logps, ref_logps + torch.expm1(d))


def ratio_weight(logps: Tensor, ref_logps: Tensor, preferred: Tensor | None = None) -> Tensor:
    """min(1, p/r): below r, d(p/r)/dlog p = p/r.

    BNF's o(p)/o(r) is this times (1-r)/(1-p), so the two meet as r goes to 0, and odds let go
    sooner of a token that the reference was sure of.
    """
    return torch.exp(torch.clamp(logps - ref_logps, max=0))


def topr_potential(logps: Tensor, ref_logps: Tensor, preferred: Tensor) -> Tensor:
    """TOPR, token by token: Φ = log p if preferred, else ratio's.

    Le Roux et al. 2025, arXiv 2503.14286: a good response is fine-tuned on, a bad one weighted by
    its truncated importance ratio min(1, P/R). There P and R are of whole trajectories under the
    policy and under the model that sampled them; here p and r are of one token, and r is the
    reference's. The paper sums over tokens, so "batch" is the default length.
    """
    return torch.where(preferred, logps, ratio_potential(logps, ref_logps))


def topr_weight(logps: Tensor, ref_logps: Tensor, preferred: Tensor) -> Tensor:
    """1 if preferred, else min(1, p/r)."""
    return torch.where(preferred, 1.0, ratio_weight(logps, ref_logps))


def tnpo_potential(logps: Tensor, ref_logps: Tensor, preferred: Tensor, beta: float) -> Tensor:
    """Token-wise negative preference optimisation: Φ = log p if preferred, and if not

        Φ = (2/β) log(1 + (p/r)^β)        so from r to 0 it falls by (2/β) log 2

    Wang et al. 2025, arXiv 2502.19301, whose published code gives β no default (1 is this
    project's), adds 1e-5 to the weight's denominator (at p = r = 1e-6 and β = 1 the weight is 1/6
    instead of 1; here there is no epsilon) and averages over all tokens of a batch: so "batch" is
    the default length. There rejected tokens are data to be unlearnt.
    """
    softplus = -F.logsigmoid(-beta * (logps - ref_logps))
    return torch.where(preferred, logps, 2 / beta * softplus)


def tnpo_weight(logps: Tensor, ref_logps: Tensor, preferred: Tensor, beta: float) -> Tensor:
    """1 if preferred, else 2 p^β / (p^β + r^β) = 2 σ(β log(p/r)), the slope of softplus times 2.

    1 at p = r, and 2 far above it.
    """
    return torch.where(preferred, 1.0, 2 * torch.sigmoid(beta * (logps - ref_logps)))


def power_potential(logps: Tensor, ref_logps, preferred: Tensor, alpha: float) -> Tensor:
    """Φ = (p^α - 1)/α for both kinds, and its limit log p at α = 0: from r to 0 it falls by r^α/α.

    On preferred tokens arXiv 2510.00526 (Li et al. 2025) studies all α; α = 1, the default, is DFT
    (Wu et al. 2025, arXiv 2508.05629). On rejected ones it is weighted gradient ascent, WGA (Wang
    et al. 2025, arXiv 2502.19301). Both write -stopgrad(p^α) log p, which has this gradient but
    another value, and average over all tokens of a batch: so "batch" is the default length.
    """
    return torch.expm1(alpha * logps) / alpha if alpha else logps


def power_weight(logps: Tensor, ref_logps, preferred: Tensor, alpha: float) -> Tensor:
    """dΦ/dlog p = p^α: what the model holds to be improbable is hardly pushed, either way."""
    return torch.exp(alpha * logps)


# --------------------------------------------------------------- losses that couple a pair's tokens
# Each is a function of two numbers per pair: sums or means of its responses' log-probabilities. So
# its gradient is two numbers per pair, given to every token of the response (divided by its length
# where the number is a mean).


def _sums(responses: Responses, against_reference: bool = False) -> tuple[Tensor, Tensor]:
    """S_w and S_l (P,), of log-ratios where it is against the reference."""
    logps = responses.logps - responses.ref_logps if against_reference else responses.logps
    return responses.sums(logps)[responses.pairs].unbind(1)


def _lengths(responses: Responses) -> tuple[Tensor, Tensor]:
    """|y_w| and |y_l| (P,)."""
    return responses.lengths()[responses.pairs].unbind(1)


def _means(responses: Responses, against_reference: bool = False) -> tuple[Tensor, Tensor]:
    """a_w and a_l (P,)."""
    (S_w, S_l), (n_w, n_l) = _sums(responses, against_reference), _lengths(responses)
    return S_w / n_w, S_l / n_l


def _spread(responses: Responses, chosen: Tensor, rejected: Tensor, mean: bool = False) -> Tensor:
    """A pair's two derivatives, given to its tokens, for the mean over pairs.

    chosen, rejected (P,): dL_pair/dS_w and dL_pair/dS_l, or by a_w and a_l (mean). -> (N,) dlogps.
    """
    pairs = responses.pairs.flatten()  # (2P,)
    both = torch.stack([chosen, rejected], 1).flatten()
    both = both / (responses.step_examples or len(responses.pairs))
    # those of a response in several pairs add up
    g = both.new_zeros(len(responses.preferred)).index_add(0, pairs, both)
    return (g / responses.lengths() if mean else g)[responses.owner]


def _likelihood_gradient(responses: Responses) -> Tensor:
    """(N,) dlogps of the mean over pairs of -a_w: -1/|y_w| for a chosen token."""
    one = responses.logps.new_ones(len(responses.pairs))
    return _spread(responses, -one, torch.zeros_like(one), mean=True)


def dpo_value(responses: Responses, beta: float, lam: float) -> Tensor:
    """-log σ(β Δ) - λ a_w;  Δ = (S_w - S_ref,w) - (S_l - S_ref,l), sequence sums in nats.

    Rafailov et al. 2023, arXiv 2305.18290, equation 7. λ > 0 adds the chosen response's mean
    negative log-likelihood: DPO + NLL, iterative RPO (Pang et al. 2024, arXiv 2404.19733v3,
    equation 1, λ = 1 there). TRL's `sigmoid` is λ = 0 (it takes no notice of label_smoothing); its
    `sft` term averages over all chosen tokens of the batch at once.
    """
    S_w, S_l = _sums(responses, against_reference=True)
    a_w, _ = _means(responses)
    return responses.mean(-F.logsigmoid(beta * (S_w - S_l)) - lam * a_w)


def dpo_gradient(responses: Responses, beta: float, lam: float) -> Tensor:
    """d(-log σ(x))/dx = -σ(-x) and dΔ/dlog p = ±1.

    So a chosen token has -β σ(-βΔ) and a rejected one the opposite; the second term adds -λ/|y_w|
    to a chosen token. There is one number per pair: every token of a response is pushed alike,
    until the margin Δ grows, however improbable a rejected token has become (unidirectional
    feedback).
    """
    S_w, S_l = _sums(responses, against_reference=True)
    push = beta * torch.sigmoid(-beta * (S_w - S_l))
    return _spread(responses, -push, push) + lam * _likelihood_gradient(responses)


def rdpo_value(responses: Responses, beta: float, alpha: float) -> Tensor:
    """-log σ(β Δ + α (|y_w| - |y_l|)): DPO for the reward r - α|y|; a token costs α nats.

    Park et al. 2024, arXiv 2403.19159. Secondary sources disagree on α's sign. It follows from the
    optimum, where β log(π/π_ref) = r - α|y| + const: r is the log-ratio plus α|y|, hence the +
    inside σ. TRL has no such loss.
    """
    return responses.mean(-F.logsigmoid(_rdpo_margin(responses, beta, alpha)))


def rdpo_gradient(responses: Responses, beta: float, alpha: float) -> Tensor:
    """Lengths are constants, so only σ's argument differs from DPO's."""
    push = beta * torch.sigmoid(-_rdpo_margin(responses, beta, alpha))
    return _spread(responses, -push, push)


def _rdpo_margin(responses: Responses, beta: float, alpha: float) -> Tensor:
    S_w, S_l = _sums(responses, against_reference=True)
    n_w, n_l = _lengths(responses)
    return beta * (S_w - S_l) + alpha * (n_w - n_l)


def ipo_value(responses: Responses, beta: float) -> Tensor:
    """(Δ̄ - 1/(2β))²;  Δ̄ is Δ with each response's log-ratio averaged over its tokens.

    Azar et al. 2023, arXiv 2310.12036, equation 17, with τ = β. The paper sums over tokens; its
    authors told the makers of TRL that averaging is meant, TRL averages, and so does this.
    """
    a_w, a_l = _means(responses, against_reference=True)
    return responses.mean((a_w - a_l - 1 / (2 * beta)).square())


def ipo_gradient(responses: Responses, beta: float) -> Tensor:
    """d/dΔ̄ = 2 (Δ̄ - 1/(2β)), and dΔ̄/dlog p = ±1/|y|.

    It changes sign at its target: a margin that is too large is pulled back.
    """
    a_w, a_l = _means(responses, against_reference=True)
    push = 2 * (a_w - a_l - 1 / (2 * beta))
    return _spread(responses, push, -push, mean=True)


def slic_value(responses: Responses, delta: float, lam: float) -> Tensor:
    """max(0, δ - S_w + S_l) - λ S_w, sequence sums.

    Zhao et al. 2023, arXiv 2305.10425, equation 4 (SLiC-HF), its regularisation target being the
    chosen response. TRL's `hinge` is another loss: max(0, 1 - βΔ) against the reference, without
    the likelihood term.
    """
    S_w, S_l = _sums(responses)
    return responses.mean(F.relu(delta - S_w + S_l) - lam * S_w)


def slic_gradient(responses: Responses, delta: float, lam: float) -> Tensor:
    """-1 for a chosen token and +1 for a rejected one within the margin, S_w - S_l < δ.

    Beyond the margin both are 0. A chosen token has -λ besides.
    """
    S_w, S_l = _sums(responses)
    within = (delta - S_w + S_l > 0).to(S_w.dtype)
    return _spread(responses, -within - lam, within)


def orpo_value(responses: Responses, lam: float) -> Tensor:
    """-a_w - λ log σ(log o(e^{a_w}) - log o(e^{a_l})): fine-tuning plus a log odds ratio.

    The odds are those of mean probabilities e^a. Hong et al. 2024, arXiv 2403.07691, equations 6
    and 7. The NLL covers the response alone, as in the paper's notation; TRL's covers the prompt's
    tokens too. Infinite where e^{a_l} = 1 to machine precision.
    """
    a_w, a_l = _means(responses)
    return responses.mean(-a_w - lam * F.logsigmoid(_logit(a_w) - _logit(a_l)))


def orpo_gradient(responses: Responses, lam: float) -> Tensor:
    """Put p = e^a, q = 1 - p and ρ for the difference of log odds.

    Then dρ/da_w = 1/q_w and dρ/da_l = -1/q_l:

        dL/da_w = -1 - λ σ(-ρ)/q_w        dL/da_l = λ σ(-ρ)/q_l        dlogps = dL/da / |y|

    σ(-ρ) = 1/(1 + o_w/o_l) and o_w/o_l = k q_l/q_w with k = p_w/p_l. So σ(-ρ)/q_w = 1/(q_w + k q_l)
    and σ(-ρ)/q_l = 1/(q_l + k q_l²/q_w), which hold where the odds overflow or vanish.
    """
    a_w, a_l = _means(responses)
    k, q_w, q_l = torch.exp(a_w - a_l), -torch.expm1(a_w), -torch.expm1(a_l)
    by_a_w, by_a_l = -1 - lam / (q_w + k * q_l), lam / (q_l + k * q_l * (q_l / q_w))
    return _spread(responses, by_a_w, by_a_l, mean=True)


def _logit(a: Tensor) -> Tensor:
    """log o(e^a) = a - log(1 - e^a), a <= 0, by the form of log(1 - e^a) that is accurate there."""
    near = a > -0.6931
    close = torch.log(-torch.expm1(torch.where(near, a, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, a)))
    return a - torch.where(near, close, far)


def simpo_value(responses: Responses, beta: float, gamma: float) -> Tensor:
    """-log σ(β (a_w - a_l) - γ), mean log-probabilities, no reference.

    Meng et al. 2024, arXiv 2405.14734, equation 6. In TRL it is loss_type="simpo" of the CPO
    trainer, which adds an NLL term unless cpo_alpha = 0; its `sigmoid_norm` is lndpo.
    """
    a_w, a_l = _means(responses)
    return responses.mean(-F.logsigmoid(beta * (a_w - a_l) - gamma))


def simpo_gradient(responses: Responses, beta: float, gamma: float) -> Tensor:
    """∓β σ(γ - β (a_w - a_l)) by a_w and a_l, and da/dlog p = 1/|y|."""
    a_w, a_l = _means(responses)
    push = beta * torch.sigmoid(gamma - beta * (a_w - a_l))
    return _spread(responses, -push, push, mean=True)


def cpo_value(responses: Responses, beta: float, lam: float) -> Tensor:
    """-log σ(β (S_w - S_l)) - λ a_w: DPO against a uniform reference, with likelihood.

    Xu et al. 2024, arXiv 2401.08417, equations 3 and 5. The paper's NLL sums over tokens; TRL's
    averages over all chosen tokens of the batch, and here it averages over each response.
    """
    S_w, S_l = _sums(responses)
    a_w, _ = _means(responses)
    return responses.mean(-F.logsigmoid(beta * (S_w - S_l)) - lam * a_w)


def cpo_gradient(responses: Responses, beta: float, lam: float) -> Tensor:
    """∓β σ(-β (S_w - S_l)), and -λ/|y_w| for a chosen token."""
    S_w, S_l = _sums(responses)
    push = beta * torch.sigmoid(-beta * (S_w - S_l))
    return _spread(responses, -push, push) + lam * _likelihood_gradient(responses)


def apo_zero_value(responses: Responses, beta: float) -> Tensor:
    """σ(-β Δ_w) + σ(β Δ_l);  Δ_w = S_w - S_ref,w and Δ_l likewise, sequence sums.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7, 1 - σ(β Δ_w) + σ(β Δ_l). β = 0.1 is
    TRL's default. It is twice kto at z0 = 0 on pairs, for kto averages over responses.
    """
    S_w, S_l = _sums(responses, against_reference=True)
    return responses.mean(torch.sigmoid(-beta * S_w) + torch.sigmoid(beta * S_l))


def apo_zero_gradient(responses: Responses, beta: float) -> Tensor:
    """∓β σ(x) σ(-x), x = β Δ_w or β Δ_l: each response is pushed by where it alone stands.

    The push is largest at the reference and fades on both sides: for a whole response what BNF's
    does for a token.
    """
    S_w, S_l = _sums(responses, against_reference=True)
    by_w, by_l = (beta * torch.sigmoid(beta * S) * torch.sigmoid(-beta * S) for S in (S_w, S_l))
    return _spread(responses, -by_w, by_l)


def lndpo_value(responses: Responses, beta: float) -> Tensor:
    """-log σ(β Δ̄): DPO with each response's log-ratio averaged over its tokens, as in ipo.

    Lambert et al. 2024 (Tülu 3), arXiv 2411.15124, whose β is 5. TRL's `sigmoid_norm`.
    """
    a_w, a_l = _means(responses, against_reference=True)
    return responses.mean(-F.logsigmoid(beta * (a_w - a_l)))


def lndpo_gradient(responses: Responses, beta: float) -> Tensor:
    """∓β σ(-β Δ̄) by the two means, and dΔ̄/dlog p = ±1/|y|."""
    a_w, a_l = _means(responses, against_reference=True)
    push = beta * torch.sigmoid(-beta * (a_w - a_l))
    return _spread(responses, -push, push, mean=True)


def bdpo_value(responses: Responses, beta: float, lam: float) -> Tensor:
    """-log σ(β (Δ_w - M));  M = log((1-λ) + λ e^{Δ_l}): DPO, its rejected response bounded.

    Cho et al. 2025, arXiv 2506.12725: in DPO the rejected response's probability P_l becomes the
    mixture λ P_l + (1-λ) R_l with the reference's. M is the mixture's log-ratio, never below
    log(1-λ). λ = 0.5 is the paper's; λ = 1 is DPO. β = 0.1 is DPO's customary one.
    """
    chosen, mixed, _ = _bdpo_parts(responses, lam)
    return responses.mean(-F.logsigmoid(beta * (chosen - mixed)))


def bdpo_gradient(responses: Responses, beta: float, lam: float) -> Tensor:
    """∓β σ(-x), x = β (Δ_w - M), times dM/dΔ_l = ρ for a rejected token.

    ρ = λ e^{Δ_l} / ((1-λ) + λ e^{Δ_l}) = σ(Δ_l + logit λ), the policy's share in the mixture: a
    rejected response is let go once the policy has left it, whatever the margin.
    """
    chosen, mixed, share = _bdpo_parts(responses, lam)
    push = beta * torch.sigmoid(-beta * (chosen - mixed))
    return _spread(responses, -push, push * share)


def _bdpo_parts(responses: Responses, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """Δ_w, M and ρ of each pair, all (P,); log 0 = -inf is right where λ is 0 or 1."""
    S_w, S_l = _sums(responses, against_reference=True)
    lam = torch.full_like(S_l, lam)
    mixed = torch.logaddexp(S_l + lam.log(), torch.log1p(-lam))
    return S_w, mixed, torch.sigmoid(S_l + lam.logit())


# --------------------------------------------------------- and one that couples a response's own


def kto_value(responses: Responses, beta: float, lam_d: float, lam_u: float, kl) -> Tensor:
    """The mean over responses of λ_d (1 - σ(x)) if preferred, else λ_u (1 - σ(-x)).

    x = β (S - S_ref - z0), z0 = kl. Ethayarajh et al. 2024, arXiv 2402.01306, equation 7. Pairs are
    ignored: each response is an example. kl, detached, is the paper's estimate of KL(π, π_ref):
    max(0, mean of S - S_ref over prompts with other prompts' responses). The trainer computes it,
    mismatching once, over the data. TRL rotates the completions by one within a batch of the map
    that prepares the data, and averages over the devices' batches; the authors' own code does as
    the paper.
    """
    x, sign, lam = _kto_parts(responses, beta, lam_d, lam_u, kl)
    return responses.mean(lam * torch.sigmoid(-sign * x))


def kto_gradient(responses: Responses, beta: float, lam_d: float, lam_u: float, kl) -> Tensor:
    """d/dx λ σ(-s x) = -s λ σ(x) σ(-x) and dx/dlog p = β: largest at x = 0, the reference point.

    Every token of a response is pushed alike, by where the whole response stands.
    """
    x, sign, lam = _kto_parts(responses, beta, lam_d, lam_u, kl)
    g = -sign * lam * beta * torch.sigmoid(x) * torch.sigmoid(-x)  # (R,)
    return (g / (responses.step_examples or len(g)))[responses.owner]


def _kto_parts(responses, beta, lam_d, lam_u, kl) -> tuple[Tensor, Tensor, Tensor]:
    """x, s and λ of each response, all (R,)."""
    x = beta * (responses.sums(responses.logps - responses.ref_logps) - kl)
    preferred = responses.preferred.to(x.dtype)
    return x, 2 * preferred - 1, lam_d * preferred + lam_u * (1 - preferred)
