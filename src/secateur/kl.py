"""KL: how far the pruned model's next-token distributions lie from the dense model's, over the whole vocabulary.

In: both models' last hidden states on the same block, and both heads. Out: KL(dense || pruned) in nats and whether both
models put the same token first, per position. Only the dense model's hidden states and head must outlive it, so that
the two models need not be in memory together; logits are made for slices of positions and never held as a whole.

P: positions of a block that predict a token of it (T - 1); D: hidden size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from secateur.arch import Arch
from secateur.errors import NumericsError
from secateur.facts import Divergence

# Positions per slice of logits: 2 models x 64 x 150k words x float32 is 77 MB.
KL_POSITIONS = 64
# Rows of logits at a time in float32: four times as fast on a CPU as 64, whose intermediate results fill 12 MB each.
CACHED_ROWS = 8


@dataclass(frozen=True, slots=True)
class DenseStates:
    """What is kept of the dense model: its head, and per domain the last hidden states of every block."""

    head: nn.Module
    states_NPD: dict[str, list[Tensor]]


@torch.inference_mode()
def final_states(model: nn.Module, arch: Arch, ids_1T: Int64[Tensor, "1 T"]) -> Float[Tensor, "P D"]:
    """Return what the head reads at every position that predicts a token of the block; P = T - 1."""
    ids_1T = ids_1T.to(next(model.parameters()).device)
    return model.get_submodule(arch.backbone)(ids_1T, use_cache=False).last_hidden_state[0, :-1]


@torch.inference_mode()
def token_divergences(
    dense_PD: Float[Tensor, "P D"], dense_head: nn.Module, pruned_PD: Float[Tensor, "P E"], pruned_head: nn.Module
) -> Float[Tensor, " P"]:
    """Return sum_v p(v) (log p(v) - log q(v)) per position, p of the dense and q of the pruned model.

    The softmax runs in float32 on the logits as the models give them. A model against itself: 0 everywhere.
    """
    pairs = _logit_slices(dense_PD, dense_head, pruned_PD, pruned_head)
    return torch.cat([_divergences(dense_SV, pruned_SV) for dense_SV, pruned_SV in pairs])


@torch.inference_mode()
def token_divergences_and_agreements(
    dense_PD: Float[Tensor, "P D"], dense_head: nn.Module, pruned_PD: Float[Tensor, "P E"], pruned_head: nn.Module
) -> tuple[Float[Tensor, " P"], Bool[Tensor, " P"]]:
    """Return `token_divergences`, and whether both models put the same token first."""
    divergences, agreements = [], []
    for dense_SV, pruned_SV in _logit_slices(dense_PD, dense_head, pruned_PD, pruned_head):
        divergences.append(_divergences(dense_SV, pruned_SV))
        agreements.append(dense_SV.argmax(-1) == pruned_SV.argmax(-1))
    return torch.cat(divergences), torch.cat(agreements)


def _logit_slices(
    dense_PD: Tensor, dense_head: nn.Module, pruned_PD: Tensor, pruned_head: nn.Module
) -> Iterator[tuple[Tensor, Tensor]]:
    for dense_SD, pruned_SD in zip(dense_PD.split(KL_POSITIONS), pruned_PD.split(KL_POSITIONS), strict=True):
        yield dense_head(dense_SD), pruned_head(pruned_SD)


def _divergences(dense_SV: Tensor, pruned_SV: Tensor) -> Tensor:
    """Return the divergence per row of logits, a few rows at a time, which then stay in the processor's cache."""
    found = []
    for dense_RV, pruned_RV in zip(dense_SV.split(CACHED_ROWS), pruned_SV.split(CACHED_ROWS), strict=True):
        log_p, log_q = dense_RV.float().log_softmax(-1), pruned_RV.float().log_softmax(-1)
        found.append(torch.linalg.vecdot(log_p.exp(), log_p - log_q))
    return torch.cat(found)


def summarise(domain: str, divergences_NP: list[Tensor], agreements_NP: list[Tensor]) -> Divergence:
    """Return the figures over all tokens of a domain's blocks. Raises NumericsError if a divergence is not finite."""
    all_tokens = torch.cat(divergences_NP).cpu().double()
    if not bool(all_tokens.isfinite().all()):
        raise NumericsError(f"KL, domain {domain}: a divergence is not finite; one model gives no finite logits.")
    block_means = torch.stack([block.cpu().double().mean() for block in divergences_NP])
    error = float(block_means.std()) / math.sqrt(len(block_means)) if len(block_means) > 1 else 0.0
    return Divergence(
        mean=float(all_tokens.mean()),
        standard_error=error,
        p95=float(numpy.quantile(all_tokens.cpu().numpy(), 0.95)),
        top1_agreement=float(torch.cat(agreements_NP).cpu().double().mean()),
        num_tokens=all_tokens.numel(),
    )
