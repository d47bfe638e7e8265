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
    assert torch.allclose(found, torch.distributions.Categorical(logits=logits).entropy())
    assert largest.elements <= 7 * 40, "a tensor larger than a chunk's logits"


def test_dlogits_capped(exercise):
    torch.manual_seed(0)
    x = (20 * torch.randn(6, 9).double()).requires_grad_()
    targets, dlogps = torch.randint(9, (6,)), torch.randn(6).double()
    logps = token_logps(x, torch.eye(9).double(), targets, softcap=30.0)
    (wanted,) = torch.autograd.grad((dlogps * logps).sum(), x)
    assert torch.allclose(exercise.dlogits_capped(x.detach(), targets, dlogps, 30.0), wanted)
