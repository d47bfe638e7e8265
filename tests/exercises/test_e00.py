import torch

from minibnf.feedback import feedback


def test_dlogits_is_autograds_for_a_loss_of_log_p(exercise):
    z = torch.tensor([2.0, 0.5, -1.0, 0.25], dtype=torch.float64, requires_grad=True)
    logp = z.log_softmax(-1)[2]
    (logp**2 / 3).backward()
    given = z.detach().clone()
    found = exercise.dlogits(given, 2, 2 * logp.item() / 3)
    assert torch.allclose(found, z.grad)
    assert torch.equal(given, z), "z was changed"


def test_tent_is_the_library_s_feedback_of_bnf(exercise):
    p = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    for r in (0.05, 0.4, 0.9):
        assert torch.allclose(exercise.tent(p, r), feedback("bnf", p, r, preferred=False))
    assert not exercise.tent(torch.tensor([0.0, 1.0]), 0.4).any(), "not 0 at both ends"
