"""The distillation loss with its gradient, and held-out KL and loss by domain."""

import copy
import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import NumericsError
from secateur.facts import Verdict, Verdicts, mean_kl, mean_nats
from secateur.log import Progress, silent
from secateur.model.bind import Arch, head_of
from secateur.stream.losses import compare_tokens, head_inputs, summarise

SLICE_POSITIONS = 8  # of logits that are computed at a time; more do not fit the cache of a core


@torch.no_grad()
def logits_of(model: nn.Module, ids_BT: Int64[Tensor, "B T"]) -> Float[Tensor, "P V"]:
    """Return a model's logits at the P = B * (T - 1) predicting positions, without gradients."""
    return model(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)


def distillation_loss(
    logits_PV: Float[Tensor, "P V"],
    next_P: Int[Tensor, " P"],
    dense_PV: Float[Tensor, "P V"] | None,
    *,
    kl_share: float = 1.0,
) -> Float[Tensor, ""]:
    """Return mean_P of s * KL(p || q) - (1 - s) * log q(next), in nats.

    s: `kl_share`; q = softmax(logits); p: the same of `dense_PV`, the teacher's logits. `dense_PV`
    None: plain cross-entropy.

    Source: Hinton, Vinyals, Dean, arXiv 1503.02531, section 2, at a temperature of 1.
    """
    share = 0.0 if dense_PV is None else kl_share
    return _Distillation.apply(logits_PV, next_P, dense_PV, share)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_PV: Tensor,
        next_P: Tensor,
        dense_PV: Tensor | None,
        share: float,
    ) -> Tensor:
        """Return the loss; compute its gradient on the way, slice by slice."""
        gradient_PV = torch.empty_like(logits_PV)
        total = logits_PV.new_zeros((), dtype=torch.float64)
        for start in range(0, len(logits_PV), SLICE_POSITIONS):
            part = slice(start, start + SLICE_POSITIONS)
            logits, next_S1 = logits_PV[part].float(), next_P[part, None]
            gradient, log_sum = _softmax(logits)
            loss_P = (share - 1) * (logits.gather(1, next_S1)[:, 0] - log_sum)
            if share > 0:
                assert dense_PV is not None
                dense = dense_PV[part].float()
                p, dense_log_sum = _softmax(dense)
                divergence_P = torch.linalg.vecdot(p, dense - logits) - dense_log_sum + log_sum
                loss_P += share * divergence_P
                gradient.sub_(p, alpha=share)  # q - p: the slope of KL(p || q)
            gradient.scatter_add_(1, next_S1, logits.new_full(next_S1.shape, share - 1))
            total += loss_P.double().sum()
            gradient_PV[part] = gradient.mul_(1 / len(logits_PV))
        ctx.save_for_backward(gradient_PV)
        return (total / len(logits_PV)).float()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scale the saved gradient, in place: autograd refuses a second call."""
        (gradient_PV,) = ctx.saved_tensors
        return gradient_PV.mul_(outer.to(gradient_PV.dtype)), None, None, None


def _softmax(logits_PV: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(logits) and log sum_v exp(logits), from one exponential of each logit."""
    softmax_PV = logits_PV.softmax(-1)
    return softmax_PV, logits_PV.amax(-1) - softmax_PV.amax(-1).log()


class Judge:
    """Judges models by held-out blocks, of which it has what the dense model's head reads, and the head."""

    def __init__(
        self,
        dense: PreTrainedModel,
        arch: Arch,
        held_out_NT: dict[str, Int64[Tensor, "M T"]],
        progress: Progress = silent,
    ) -> None:
        self.held_out_NT = held_out_NT
        self._head = head_of(dense, arch)  # moves with the dense model
        blocks = [ids_T for domain_NT in held_out_NT.values() for ids_T in domain_NT]
        states = head_inputs(dense, arch, blocks, progress, "judge dense")
        self._states = {domain: list(islice(states, len(held))) for domain, held in held_out_NT.items()}

    def copy_head(self) -> None:
        """Copy the head, so that the dense model may be sharded."""
        self._head = copy.deepcopy(self._head)

    @torch.no_grad()
    def logits(self, states_PD: Float[Tensor, "P D"]) -> Float[Tensor, "P V"]:
        """Return the dense model's logits from what its head reads."""
        return self._head(states_PD.to(self._device()))

    def dense(self) -> Verdicts:
        """Return the dense model's own verdicts: a KL of zero, and its loss."""
        return self._verdicts(lambda domain, number, _: self._head(self._states[domain][number].to(self._device())))

    @torch.no_grad()
    def verdicts(self, logits_of: Callable[[Tensor], Tensor]) -> Verdicts:
        """Return each domain's verdict. `logits_of`: (B, T) ids to (B, T, V) logits.

        Raises NumericsError naming the domain if a divergence is not finite.
        """
        return self._verdicts(lambda _, __, ids_T: logits_of(ids_T[None])[0, :-1])

    def _device(self) -> torch.device:
        return next(self._head.parameters()).device

    @torch.no_grad()
    def _verdicts(self, logits_of: Callable[[str, int, Tensor], Tensor]) -> Verdicts:
        found: Verdicts = {}
        for domain, blocks in self.held_out_NT.items():
            divergences, agreements, losses = [], [], []
            for number, (ids_T, states_PD) in enumerate(zip(blocks, self._states[domain], strict=True)):
                logits_PV = logits_of(domain, number, ids_T).to(self._device())
                states_PD = states_PD.to(self._device())
                divergence_P, agrees_P, _ = compare_tokens(states_PD, self._head, logits_PV, nn.Identity())
                divergences.append(divergence_P)
                agreements.append(agrees_P)
                next_P = ids_T[1:].to(logits_PV.device)
                slices = zip(logits_PV.split(SLICE_POSITIONS), next_P.split(SLICE_POSITIONS), strict=True)
                losses += [nn.functional.cross_entropy(part.float(), ids, reduction="none") for part, ids in slices]
            summary = summarise(domain, divergences, agreements)
            kl = max(summary.mean, 0.0)  # rounding may leave it a hair below zero
            nats = float(torch.cat(losses).double().mean())
            found[domain] = Verdict(kl, summary.standard_error, nats, summary.top1_agreement, summary.num_tokens)
        return found


def unless_diverged(judged: Callable[[], Verdicts]) -> Verdicts | None:
    """Return the verdicts, None if the model's logits are not finite: its training has diverged."""
    try:
        return judged()
    except NumericsError:
        return None


def objective(verdicts: Verdicts | None, kl_share: float) -> float:
    """Return what training minimises: kl_share * KL + (1 - kl_share) * nats per token, means.

    Infinite without verdicts.
    """
    if verdicts is None:
        return math.inf
    return kl_share * mean_kl(verdicts) + (1 - kl_share) * mean_nats(verdicts)
