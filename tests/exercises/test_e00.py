import torch

Z = torch.tensor([2.0, 0.5, 0.0, -0.5, 1.5], dtype=torch.float64)


def test_dlogits_soft_is_autograds(exercise):
    for q in ([0.0, 1.0, 0.0, 0.0, 0.0], [0.2, 0.1, 0.3, 0.2, 0.2], [1.0, 0.0, 0.5, 0.0, 0.5]):
        q = torch.tensor(q, dtype=torch.float64)
        z = Z.clone().requires_grad_()
        (-(q * z.log_softmax(-1)).sum()).backward()
        found = exercise.dlogits_soft(Z.clone(), q)
        assert not torch.allclose(found, -z.grad), "the sign: L has a minus in front"
        slip = "is Σ q there? every q_v brings its own -π" if q.sum() > 1 else "q = 1[v = y] first"
        assert torch.allclose(found, z.grad), slip


def test_gains_are_how_softmax_moves(exercise):
    for y in range(5):
        given = Z.clone()
        found = exercise.gains(given, y)
        assert torch.equal(given, Z), "z was changed: copy before you write into it"
        assert found[y] < 0, "y itself must lose: is the step's sign right?"
        slip = "what some gain others lose: is the average rise, Σ_u π_u dz_u, subtracted?"
        assert abs(found.sum().item()) < 1e-12, slip
        p, step = Z.softmax(-1), 1e-6
        direction = (torch.arange(5) == y).double() - p  # d log p/dz
        ends = [(Z + e * direction).softmax(-1) for e in (-step, step)]
        by_difference = (ends[0] - ends[1]) / (2 * step)
        slip = "finite differences say otherwise: does every logit move, not y's alone?"
        if torch.allclose(found, -direction):
            slip = "that is how z moves, not π: push it through softmax"
        assert torch.allclose(found, by_difference, rtol=0, atol=1e-8), slip
