"""The formulae in float64, written from their definitions; nothing here comes from the product."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from reference_methods import domain_factor as domain_factor
from reference_methods import removal_change, removal_error
from torch import Tensor
from torch.nn.functional import kl_div

# Statistics, losses

FLOAT32_STEP = 2.0**-23  # between 1 and the next float32


@dataclass(frozen=True)
class Sums:
    """Sums over tokens with weights w: w, w x, w x^2, w |y|^2, w x x' and w x r'."""

    mass: float
    inputs_F: Tensor
    squares_F: Tensor
    energy: float
    gram_FF: Tensor
    cross_FH: Tensor | None = None


def domain_sums(x_TF: Tensor, y_TH: Tensor, drift_TH: Tensor | None = None) -> Sums:
    """Return the sums of one domain's tokens, each of weight 1. `y_TH`: outputs without bias."""
    x, y = x_TF.double(), y_TH.double()
    cross = None if drift_TH is None else torch.einsum("ti,tj->ij", x, drift_TH.double())
    gram = torch.einsum("ti,tj->ij", x, x)
    return Sums(float(len(x)), x.sum(0), (x * x).sum(0), float((y * y).sum()), gram, cross)


def weighted(parts: list[tuple[float, Sums]]) -> Sums:
    """Return the sum of factor times sums."""
    drifts = [(factor, each.cross_FH) for factor, each in parts if each.cross_FH is not None]
    return Sums(
        sum(factor * each.mass for factor, each in parts),
        torch.stack([factor * each.inputs_F for factor, each in parts]).sum(0),
        torch.stack([factor * each.squares_F for factor, each in parts]).sum(0),
        sum(factor * each.energy for factor, each in parts),
        torch.stack([factor * each.gram_FF for factor, each in parts]).sum(0),
        torch.stack([factor * cross for factor, cross in drifts]).sum(0) if drifts else None,
    )


def removal_scores(weight_HF: Tensor, hessian_FF: Tensor, columns_UW: Tensor) -> Tensor:
    """Return the error under H of removing each unit alone and refitting all other columns."""
    weight, hessian = weight_HF.double().numpy(), hessian_FF.numpy()
    return torch.tensor([removal_error(weight, hessian, columns) for columns in columns_UW.tolist()])


def _error(change_HF: Tensor, matrix_FF: Tensor) -> Tensor:
    return torch.einsum("hi,ij,hj->", change_HF, matrix_FF, change_HF)


def cut_damage(
    domains: list[Sums], hessian_FF: Tensor, weight_HF: Tensor, columns_UW: Tensor, num_keep: int
) -> tuple[Tensor, Tensor]:
    """Return each domain's output error over its energy when the units of lowest score go at once.

    Also the same with all terms positive, by which rounding errors are bounded.
    """
    scores = removal_scores(weight_HF, hessian_FF, columns_UW)
    lowest = sorted(range(len(scores)), key=lambda unit: (float(scores[unit]), -unit))[: len(scores) - num_keep]
    gone = columns_UW[lowest].flatten().tolist()
    change = torch.from_numpy(removal_change(weight_HF.double().numpy(), hessian_FF.numpy(), gone))
    pairs = [(_error(change, each.gram_FF), _error(change.abs(), each.gram_FF.abs())) for each in domains]
    energies = torch.tensor([each.energy for each in domains], dtype=torch.float64)[:, None]
    errors = torch.where(energies > 0, torch.tensor(pairs, dtype=torch.float64) / energies, 0.0)
    return errors[:, 0], errors[:, 1]


def scaled_into(weights_D: Tensor, floor: float) -> Tensor:
    """Return clip(c w, floor, 1) with sum 1: fix what falls below the floor, scale the rest, repeat."""
    fixed = torch.zeros(len(weights_D), dtype=torch.bool)
    while True:
        rest = 1 - floor * int(fixed.sum())
        scaled = torch.where(fixed, floor, weights_D * (rest / weights_D[~fixed].sum()))
        if not bool((scaled < floor)[~fixed].any()):
            return scaled
        fixed |= scaled < floor


def ratio_error(sums: list[float], counts: Sequence[int]) -> float | None:
    """Return the standard error of sum(sums) / sum(counts), of which each pair is a draw; None for one.

    s sqrt(n) / sum(counts) with s^2 = sum (a - ratio b)^2 / (n - 1): of equal counts that of a mean.
    """
    if len(sums) == 1:
        return None
    ratio = math.fsum(sums) / sum(counts)
    squares = math.fsum((each - ratio * count) ** 2 for each, count in zip(sums, counts, strict=True))
    return math.sqrt(squares / (len(sums) - 1) * len(sums)) / sum(counts)


def kl_per_token(dense_PV: Tensor, pruned_PV: Tensor) -> Tensor:
    """Return sum_v p (log p - log q) per position in float64, p: dense, q: pruned."""
    log_p, log_q = (each.double().log_softmax(-1) for each in (dense_PV, pruned_PV))
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
