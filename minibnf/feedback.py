"""What a loss feeds back: its push against a token's probability, and shifts against the reference.

The feedback of a token is |dL/dz_y| = |dlogps| (1 - p), the push on its own logit. Elsewhere
dL/dz_v = -dlogps p_v, so the pushes on all other logits add up to the same number. Where it fades
as p falls, the push ends by itself: BNF's does so on both sides of the reference, a tent. That of
log-likelihood grows instead, and DPO's first does too where o(r) > beta/2. Needs torch alone.
"""

import torch
from torch import Tensor

from minibnf.losses import LOSSES
from minibnf.responses import Responses


def feedback(
    name: str, p: Tensor, r: float, preferred: bool, *, length: int = 1, **hyper
) -> Tensor:
    """|dL/dz_y| (n,) of one token of probability p (n,) and reference probability r.

    The token stands in a response of `length` tokens, chosen if preferred and else rejected. All
    other tokens of the pair (of the response alone where the loss takes it unpaired) have the
    policy's probability equal to the reference's, r. It comes from the hand-derived gradient, so in
    closed form; kto's kl is 0 unless given. Raises ValueError as the loss does.
    """
    loss, n = LOSSES[name], len(p)
    hyper = {"kl": 0.0} | hyper if "kl" in loss.defaults else hyper
    both = 2 if loss.needs_pairs else 1  # the response with the token, and after it the other one
    ref = p.new_full((both * n, length), r).log()
    logps = ref.clone()
    logps[::both, 0] = p.log()
    labels = torch.tensor([preferred, not preferred][:both]).repeat(n)
    order = [0, 1] if preferred else [1, 0]
    pairs = torch.arange(2 * n).view(n, 2)[:, order] if loss.needs_pairs else None
    responses = Responses.from_padded(logps, ref, torch.ones_like(ref), labels, pairs)
    dlogps = loss.gradient(responses, **hyper)[:: both * length]
    return n * dlogps.abs() * (1 - p)  # n: the mean over n examples undone


def target_logits(
    hidden: Tensor, unembed: Tensor, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """(N,) float32 or wider: each target token's logit, from its own row of the vocabulary alone.

    hidden (N, D), unembed (V, D), targets (N,). A token's logit shift is this under the policy less
    this under the reference.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden.to(wide) * unembed[targets].to(wide)).sum(-1)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def gini(x: Tensor) -> float:
    """The Gini coefficient of |x| (n,): 0 where all are equal, towards 1 where few hold everything.

    Half the mean absolute difference over the mean: Σ_i (2i - n - 1) x_i / (n Σ x_i), x sorted, i
    from 1; 0 if all are 0. The paper measures how concentrated a method's logit shifts are by it.
    """
    x = x.detach().double().abs().flatten().sort().values
    n, total = len(x), x.sum()
    if total == 0:
        return 0.0
    rank = torch.arange(1, n + 1, dtype=x.dtype, device=x.device)
    return ((2 * rank - n - 1) @ x / (n * total)).item()
