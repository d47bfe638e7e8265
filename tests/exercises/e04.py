"""Exercises of page 04, the trainer: the solutions."""

from torch import Tensor

from minibnf.responses import Responses


def adamw_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    betas: tuple,
    epsilon: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g.square()
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return p * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + epsilon), m, v


def pair_metrics(batch: Responses, beta: float) -> dict[str, float]:
    rewards = beta * batch.sums(batch.logps - batch.ref_logps)
    w, l = batch.pairs.T  # noqa: E741
    margins = rewards[w] - rewards[l]
    return {
        "rewards/chosen": rewards[batch.preferred].mean().item(),
        "rewards/rejected": rewards[~batch.preferred].mean().item(),
        "rewards/margins": margins.mean().item(),
        "rewards/accuracies": (margins > 0).double().mean().item(),
    }
