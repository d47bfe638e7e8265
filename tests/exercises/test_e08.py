import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minibnf.logprob import token_logps


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_entropies_in_chunks(exercise):
    torch.manual_seed(0)
    hidden, unembed = torch.randn(50, 3).double(), torch.randn(40, 3).double()
    with Largest() as largest:
        found = exercise.entropies(hidden, unembed, 7)  # 50 is no multiple of 7
    logits = hidden @ unembed.T
    assert found.shape == (50,), "one entropy per token, those of the last, shorter chunk too"
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(found, wanted), (
        "-Σ p log p over the vocabulary, in nats: is the sign right?"
    )
    assert largest.elements <= 7 * 40, "a tensor larger than a chunk's logits was made"


def test_dlogits_capped(exercise):
    torch.manual_seed(0)
    x = (20 * torch.randn(6, 9).double()).requires_grad_()
    targets, dlogps = torch.randint(9, (6,)), torch.randn(6).double()
    logps = token_logps(x, torch.eye(9).double(), targets, softcap=30.0)
    (wanted,) = torch.autograd.grad((dlogps * logps).sum(), x)
    found = exercise.dlogits_capped(x.detach(), targets, dlogps, 30.0)
    no_cap = wanted / (1 - torch.tanh(x.detach() / 30).square())
    assert not torch.allclose(found, no_cap), "dz/dx = 1 - tanh²(x / cap) is missing"
    assert torch.allclose(found, wanted), "is the softmax that of z, and not of x?"
