import pytest
import torch

HYPER = dict(lr=0.03, betas=(0.9, 0.95), epsilon=1e-3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_step_is_torchs(exercise, weight_decay):
    torch.manual_seed(0)
    p = torch.randn(5, dtype=torch.float64)
    theirs = p.clone().requires_grad_()
    same = {"lr": HYPER["lr"], "betas": HYPER["betas"], "eps": HYPER["epsilon"]}
    optimizer = torch.optim.AdamW([theirs], weight_decay=weight_decay, **same)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 6):
        theirs.grad = torch.randn(5, dtype=torch.float64) * 10 ** -float(step)
        before = [x.clone() for x in (p, m, v)]
        new = exercise.adamw_step(p, theirs.grad, m, v, step, weight_decay=weight_decay, **HYPER)
        assert all(map(torch.equal, (p, m, v), before)), "what was passed in was changed"
        p, m, v = new
        optimizer.step()
        torch.testing.assert_close(p, theirs.detach(), rtol=1e-10, atol=1e-12)


def test_micro_batches_add_up_to_the_mean_over_all_examples(exercise):
    torch.manual_seed(1)
    for sizes in ([4], [3, 3], [5, 2, 1]):
        losses = torch.randn(sum(sizes), dtype=torch.float64)
        weights = exercise.micro_batch_weights(sizes)
        assert len(weights) == len(sizes)
        total = sum(w * part.mean() for w, part in zip(weights, losses.split(sizes), strict=True))
        torch.testing.assert_close(total, losses.mean())
