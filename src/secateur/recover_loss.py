"""The distillation loss: how far the student's next-token distributions lie from the teacher's, and its gradient.

In: the student's logits and the teacher's log probabilities at the same positions. Out: one number to train on. Slices
of positions are worked on one after another and the gradient is made in the same pass, so that beside the logits
themselves one matrix of their size is held and no more.

B: blocks; T: tokens of a block; P: positions; V: words.
"""

from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

# Positions per slice of logits, as in `kl`.
SLICE_POSITIONS = 64


@torch.no_grad()
def teacher_log_p(teacher: nn.Module, ids_BT: Int64[Tensor, "B T"], temperature: float = 1.0) -> Float[Tensor, "P V"]:
    """Return the teacher's log probabilities at the B x (T - 1) positions that predict a token, block after block."""
    logits_BTV = teacher(input_ids=ids_BT, use_cache=False).logits
    return log_probabilities(logits_BTV[:, :-1].flatten(0, 1), temperature)


@torch.no_grad()
def log_probabilities(logits_PV: Float[Tensor, "P V"], temperature: float = 1.0) -> Float[Tensor, "P V"]:
    """Return log softmax(logits / temperature) in float32, made by slices of positions."""
    return torch.cat(
        [(piece_PV.float() / temperature).log_softmax(-1) for piece_PV in logits_PV.split(SLICE_POSITIONS)]
    )


def distillation_loss(
    logits_PV: Float[Tensor, "P V"],
    next_P: Int[Tensor, " P"],
    log_p_PV: Float[Tensor, "P V"] | None,
    weight_P: Float[Tensor, " P"],
    *,
    temperature: float = 1.0,
    kl_share: float = 1.0,
) -> Float[Tensor, ""]:
    """Return the mean over positions of weight * (s * t^2 * KL(p_t || q_t) - (1 - s) * log q(next)), in nats.

    s: `kl_share`; t: `temperature`; q_t = softmax(logits / t); log p_t: `log_p_PV`, the teacher's. The factor t^2
    keeps the gradient's size whatever the temperature. `log_p_PV` None: plain cross-entropy.

    Source: Hinton, Vinyals, Dean, arXiv 1503.02531, section 2.1.
    """
    share = 0.0 if log_p_PV is None else kl_share
    return _Distillation.apply(logits_PV, next_P, log_p_PV, weight_P, temperature, share)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_PV: Tensor,
        next_P: Tensor,
        log_p_PV: Tensor | None,
        weight_P: Tensor,
        temperature: float,
        share: float,
    ) -> Tensor:
        gradient_PV = torch.empty_like(logits_PV)
        total = logits_PV.new_zeros((), dtype=torch.float64)
        for start in range(0, len(logits_PV), SLICE_POSITIONS):
            part = slice(start, start + SLICE_POSITIONS)
            logits, weight = logits_PV[part].float(), weight_P[part].float()
            gradient = torch.zeros_like(logits)
            loss_P = torch.zeros_like(weight)
            if share < 1:
                log_q = logits.log_softmax(-1)
                loss_P -= (1 - share) * log_q.gather(1, next_P[part, None])[:, 0]
                gradient += log_q.exp_().mul_(1 - share)
                gradient.scatter_add_(1, next_P[part, None], torch.full_like(weight[:, None], share - 1))
            if share > 0:
                assert log_p_PV is not None
                log_q = (logits / temperature).log_softmax(-1)
                value_P, slope_PV = _divergence(log_p_PV[part].float(), log_q)
                loss_P += share * temperature**2 * value_P
                gradient += slope_PV.mul_(share * temperature)
            total += (weight * loss_P).double().sum()
            gradient_PV[part] = gradient.mul_(weight[:, None] / len(logits_PV)).to(gradient_PV.dtype)
        ctx.save_for_backward(gradient_PV)
        return (total / len(logits_PV)).float()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient_PV,) = ctx.saved_tensors
        return gradient_PV * outer.to(gradient_PV.dtype), None, None, None, None, None


def _divergence(log_p_PV: Tensor, log_q_PV: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) per position and q - p, its slope by the logits behind q. `log_q_PV` is used up."""
    p_PV = log_p_PV.exp()
    value_P = (p_PV * (log_p_PV - log_q_PV)).sum(-1)
    return value_P, log_q_PV.exp_().sub_(p_PV)
