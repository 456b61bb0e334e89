"""The distillation loss: how far the student's next-token distributions lie from the teacher's, and its gradient.

In: the student's logits and what the teacher said of the same positions, all logits or the likeliest ones. Out: one
number to train on. Slices of positions are worked on one after another and the gradient is made in the same pass, so
that beside the logits themselves one matrix of their size is held and no more.

P: positions; V: words; K: words of the teacher that were kept; one more outcome, `rest`, is any other word.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# Positions per slice of logits, as in `kl`.
SLICE_POSITIONS = 64


@dataclass(frozen=True, slots=True)
class Targets:
    """What the teacher said at P positions, already at the temperature of the loss.

    `log_p`: log probabilities, of all V words (`words_PK` None) or of the K likeliest, which `words_PK` names.
    """

    log_p: Tensor
    words_PK: Int[Tensor, "P K"] | None = None


@torch.no_grad()
def targets_of(logits_PV: Float[Tensor, "P V"], *, temperature: float = 1.0, num_words: int | None = None) -> Targets:
    """Return log softmax(logits / temperature), of all words or of the `num_words` likeliest; in float32."""
    log_p, words = [], []
    for piece_PV in logits_PV.split(SLICE_POSITIONS):
        log_p_PV = (piece_PV.float() / temperature).log_softmax(-1)
        if num_words is not None:
            log_p_PV, words_PK = log_p_PV.topk(num_words, dim=-1)
            words.append(words_PK)
        log_p.append(log_p_PV)
    return Targets(torch.cat(log_p), torch.cat(words) if words else None)


def distillation_loss(
    logits_PV: Float[Tensor, "P V"],
    next_P: Int[Tensor, " P"],
    targets: Targets | None,
    weight_P: Float[Tensor, " P"],
    *,
    temperature: float = 1.0,
    kl_share: float = 1.0,
) -> Float[Tensor, ""]:
    """Return the mean over positions of weight * (s * t^2 * KL(p_t || q_t) - (1 - s) * log q(next)), in nats.

    s: `kl_share`; t: `temperature`; q_t = softmax(logits / t); p_t: the teacher's, see `Targets`. The factor t^2 keeps
    the gradient's size whatever the temperature. Of K words KL counts K + 1 outcomes, the last one being any other
    word, so that the student is told how much is left over and not for what. `targets` None: plain cross-entropy.

    Source: Hinton, Vinyals, Dean, arXiv 1503.02531, section 2.1; the outcome `rest` is ours.
    """
    words_PK = None if targets is None else targets.words_PK
    log_p = None if targets is None else targets.log_p
    share = 0.0 if targets is None else kl_share
    return _Distillation.apply(logits_PV, next_P, log_p, words_PK, weight_P, temperature, share)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_PV: Tensor,
        next_P: Tensor,
        log_p: Tensor | None,
        words_PK: Tensor | None,
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
                assert log_p is not None
                log_q = (logits / temperature).log_softmax(-1)
                words = None if words_PK is None else words_PK[part].long()
                value_P, slope_PV = _divergence(log_p[part].float(), log_q, words)
                loss_P += share * temperature**2 * value_P
                gradient += slope_PV.mul_(share * temperature)
            total += (weight * loss_P).double().sum()
            gradient_PV[part] = gradient.mul_(weight[:, None] / len(logits_PV)).to(gradient_PV.dtype)
        ctx.save_for_backward(gradient_PV)
        return (total / len(logits_PV)).float()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient_PV,) = ctx.saved_tensors
        return gradient_PV * outer.to(gradient_PV.dtype), None, None, None, None, None, None


def _divergence(log_p: Tensor, log_q_PV: Tensor, words_PK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) per position and its slope by the logits behind q. `log_q_PV` is used up.

    All words: q - p. K words and the rest r: q_v - p_v of those, q_v (1 - p_r / q_r) of any other word.
    """
    if words_PK is None:
        p_PV = log_p.exp()
        value_P = (p_PV * (log_p - log_q_PV)).sum(-1)
        return value_P, log_q_PV.exp_().sub_(p_PV)
    log_q_PK = log_q_PV.gather(1, words_PK)
    p_PK, q_PK = log_p.exp(), log_q_PK.exp()
    smallest = torch.finfo(torch.float32).tiny
    p_rest, q_rest = ((1 - part.sum(-1)).clamp_min(smallest) for part in (p_PK, q_PK))
    value_P = (p_PK * (log_p - log_q_PK)).sum(-1) + p_rest * (p_rest.log() - q_rest.log())
    q_PV = log_q_PV.exp_()
    slope_PV = q_PV.mul_((1 - p_rest / q_rest)[:, None])
    slope_PV.scatter_(1, words_PK, q_PK - p_PK)
    return value_P, nn.functional.threshold(slope_PV, -torch.inf, 0.0)
