"""Liger's chunked preference losses as independent judges of token_logps and LOSSES together: from
hidden states on.

Both take hidden states and the unembedding matrix, and never hold all logits. The same loss, and
the same gradients of the hidden states and of the matrix. Liger's code is plain PyTorch where
compiled=False, so it runs on a CPU; it goes to float32 whatever it is given.
"""

import pytest
import torch

chunked_loss = pytest.importorskip(
    "liger_kernel.chunked_loss", reason="the parity extra is not installed: make parity"
)

from minibnf.logprob import token_logps  # noqa: E402
from minibnf.losses import LOSSES, Responses  # noqa: E402

P, T, D, V = 5, 9, 16, 53  # pairs, positions, width, vocabulary
seeds = pytest.mark.parametrize("seed", [0, 1, 2])
# pairs (kto: responses) that Liger takes at a time
chunks = pytest.mark.parametrize("chunk_size", [1, 2, 5])


class Case:
    """P chosen and then P rejected rows; response tokens at the end of what is not padding, two of
    them alone in theirs."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.hidden = torch.randn(2 * P, T, D, requires_grad=True)
        self.unembed = torch.randn(V, D, requires_grad=True)
        self.ref_hidden, self.ref_unembed = torch.randn(2 * P, T, D), torch.randn(V, D)
        begin, length = torch.randint(0, 4, (2 * P, 1)), torch.randint(1, 6, (2 * P, 1))
        length[0] = length[P + 1] = 1
        self.mask = (torch.arange(T) >= begin) & (torch.arange(T) < begin + length)
        self.lengths = self.mask.sum(1).tolist()
        self.targets = torch.randint(V, (2 * P, T)).masked_fill(~self.mask, -100)
        self.reference = {"ref_input": self.ref_hidden, "ref_weight": self.ref_unembed}

    def logps(self, hidden, unembed):
        """(2P, T), 0 where there is no target."""
        padded = torch.zeros(2 * P, T)
        padded[self.mask] = token_logps(hidden[self.mask], unembed, self.targets[self.mask])
        return padded

    def ours(self, *terms):
        """Σ weight * loss over terms (weight, name, hyper-parameters, which pairs)."""
        logps = self.logps(self.hidden, self.unembed)
        ref = self.logps(self.ref_hidden, self.ref_unembed)
        total = 0.0
        for weight, name, hyper, which in terms:
            n = len(which)
            rows = torch.tensor([*which, *(P + i for i in which)])
            pairs, preferred = torch.arange(2 * n).view(2, n).T, torch.arange(2 * n) < n
            padded = logps[rows], ref[rows], self.mask[rows]
            responses = Responses.from_padded(*padded, preferred, pairs)
            total = total + weight * LOSSES[name](responses, **hyper)
        return total

    def token_share(self, i: int) -> float:
        """|y_w,i| / mean |y_w|: how much pair i counts in an NLL that is a mean over all chosen
        tokens."""
        return self.lengths[i] * P / sum(self.lengths[:P])

    def assert_same(self, ours, theirs):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        inputs = self.hidden, self.unembed
        gradients = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
        for g, expected in zip(*gradients, strict=True):
            assert (g - expected).norm() <= 3e-6 * expected.norm()


ALL = range(P)


def liger(case: Case, kind: str, chunk_size: int, *, reference=False, **options):
    """The loss that Liger's class finds."""
    judge = getattr(chunked_loss, f"LigerFusedLinear{kind}Loss")
    judge = judge(**options, compiled=False, chunk_size=chunk_size)
    given = case.reference if reference else {}
    return judge(case.unembed, case.hidden, case.targets, **given)[0]


@seeds
@chunks
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo(seed, chunk_size, beta):
    """The same function."""
    case = Case(seed)
    theirs = liger(case, "DPO", chunk_size, reference=True, beta=beta)
    case.assert_same(case.ours((1.0, "dpo", {"beta": beta}, ALL)), theirs)


@seeds
@chunks
@pytest.mark.parametrize("name", ["dpo", "cpo"])
@pytest.mark.parametrize("beta, weight", [(0.1, 1.0), (0.5, 0.2)])
def test_with_nll(seed, chunk_size, name, beta, weight):
    """Liger's NLL, weighted alpha, is a mean over all chosen tokens of the batch, minibnf's a mean
    of each response's mean. So pair i has a λ of its own, alpha |y_w,i| / mean |y_w|.
    """
    case = Case(seed)
    options = {"beta": beta, "alpha": weight, "compute_nll_loss": True}
    theirs = liger(case, name.upper(), chunk_size, reference=name == "dpo", **options)
    lams = [weight * case.token_share(i) for i in ALL]
    terms = [(1 / P, name, {"beta": beta, "lam": lams[i]}, [i]) for i in ALL]
    case.assert_same(case.ours(*terms), theirs)


@seeds
@chunks
@pytest.mark.parametrize("beta, gamma", [(2.0, 1.0), (0.1, 0.5), (10.0, 3.0)])
def test_simpo(seed, chunk_size, beta, gamma):
    """The same function without the NLL that Liger adds by default."""
    case = Case(seed)
    hyper = {"beta": beta, "gamma": gamma}
    theirs = liger(case, "SimPO", chunk_size, compute_nll_loss=False, **hyper)
    case.assert_same(case.ours((1.0, "simpo", hyper, ALL)), theirs)


@seeds
@chunks
@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_orpo(seed, chunk_size, lam):
    """Given no target of its own, Liger's NLL covers the response as the paper's does, but is a
    mean over all chosen tokens of the batch: pair i counts |y_w,i| / mean |y_w| times instead of
    once, and what that is more or less is added as nll."""
    case = Case(seed)
    theirs = liger(case, "ORPO", chunk_size, beta=lam)
    more = [((case.token_share(i) - 1) / P, "nll", {}, [i]) for i in ALL]
    case.assert_same(case.ours((1.0, "orpo", {"lam": lam}, ALL), *more), theirs)


@seeds
@chunks
@pytest.mark.parametrize("beta, kl", [(0.1, 0.0), (0.1, 2.5), (0.5, 0.3)])
def test_kto(seed, chunk_size, beta, kl):
    """The same function with λ_d = λ_u = 1; Liger is given the reference point too."""
    case = Case(seed)
    judge = chunked_loss.LigerFusedLinearKTOLoss(
        beta=beta, use_ref_model=True, compiled=False, chunk_size=chunk_size
    )
    given = {"preference_labels": torch.arange(2 * P) < P, "kl": torch.tensor(kl)}
    theirs, _ = judge(case.hidden, case.unembed, case.targets, **given, **case.reference)
    case.assert_same(case.ours((1.0, "kto", {"beta": beta, "kl": kl}, ALL)), theirs)
