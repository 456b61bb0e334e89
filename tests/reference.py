"""The formulae in float64, written from their definitions; nothing here comes from the product."""

import math
from dataclasses import dataclass

import torch
from reference_methods import domain_factor as domain_factor
from torch import Tensor

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
    """Return the error under H of removing each unit alone and refitting all other columns.

    The refit is solved outright: the least of tr((W - V) H (W - V)') over V with zero columns.
    """
    gone = [columns.tolist() for columns in columns_UW]
    return torch.stack([_error(change_by_refit(weight_HF, hessian_FF, each), hessian_FF) for each in gone])


def change_by_refit(weight_HF: Tensor, hessian_FF: Tensor, gone: list[int]) -> Tensor:
    """Return W - V for the V that is zero at `gone` and nearest to W under H."""
    stay = [each for each in range(weight_HF.shape[1]) if each not in set(gone)]
    weight, changed = weight_HF.double(), weight_HF.double().clone()
    if stay:
        rest = torch.linalg.solve(hessian_FF[stay][:, stay], hessian_FF[stay][:, gone] @ weight[:, gone].T).T
        changed[:, stay] = -rest
    return changed


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
    change = change_by_refit(weight_HF, hessian_FF, columns_UW[lowest].flatten().tolist())
    pairs = [(_error(change, each.gram_FF), _error(change.abs(), each.gram_FF.abs())) for each in domains]
    errors = [
        [float(part) / each.energy if each.energy > 0 else 0.0 for part in pair]
        for pair, each in zip(pairs, domains, strict=True)
    ]
    return torch.tensor(errors, dtype=torch.float64)[:, 0], torch.tensor(errors, dtype=torch.float64)[:, 1]


def scaled_into(weights_D: Tensor, floor: float) -> Tensor:
    """Return clip(c w, floor, 1) with sum 1: fix what falls below the floor, scale the rest, repeat."""
    fixed = torch.zeros(len(weights_D), dtype=torch.bool)
    while True:
        rest = 1 - floor * int(fixed.sum())
        scaled = torch.where(fixed, floor, weights_D * (rest / weights_D[~fixed].sum()))
        if not bool((scaled < floor)[~fixed].any()):
            return scaled
        fixed |= scaled < floor


def mean_error(values: list[float]) -> float | None:
    """Return s / sqrt(n) with s^2 = sum (v - mean)^2 / (n - 1); None for one value."""
    count = len(values)
    if count == 1:
        return None
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1)) / math.sqrt(count)


def log_probabilities_of(logits_PV: Tensor) -> Tensor:
    """Return z - log sum exp(z)."""
    z = logits_PV.double()
    highest = z.amax(-1, keepdim=True)
    return z - highest - (z - highest).exp().sum(-1, keepdim=True).log()


def next_token_nats(logits_PV: Tensor, next_P: Tensor) -> Tensor:
    """Return -log p(next) per position."""
    log_p = log_probabilities_of(logits_PV)
    return torch.stack([-log_p[position, token] for position, token in enumerate(next_P.tolist())])


def kl_per_token(dense_PV: Tensor, pruned_PV: Tensor) -> Tensor:
    """Return sum_v p (log p - log q) per position, p: dense, q: pruned."""
    log_p, log_q = log_probabilities_of(dense_PV), log_probabilities_of(pruned_PV)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def bits_per_byte(nats: list[float], num_bytes: int) -> float:
    """Return all predicted tokens' information in bits over the bytes they stand for."""
    return math.fsum(nats) / math.log(2) / num_bytes
