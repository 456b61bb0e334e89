"""Compensation: refit a reader's remaining weights so that its output changes least.

Ridge least squares, checked on held-out text: a correction that does not help is not taken.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.facts import PerDomain
from secateur.model.stock import replaced
from secateur.stream.device import float64_device
from secateur.stream.statistics import (
    Gram,
    GroupStatistics,
    cholesky_of,
    complement,
    decided,
    exact_product_precision,
    ridge_of,
    totals,
)

# Shares of a correction that the guard tries, largest first; 0 means the old weights stay.
GUARD_STEPS = (1.0, 0.5, 0.25)


@dataclass(frozen=True, slots=True)
class Method:
    """How units are chosen and readers repaired: numbers, and names as in recipes."""

    score: str
    compensate: str
    damping: float
    target_mix: float
    weighting: str


HeldOutSums = Tensor
"""|lost|^2, lost . correction, |correction|^2 and the output energy, in float64."""


@dataclass(frozen=True, slots=True)
class HeldOutError:
    """One domain's error by step a, over output energy: constant - 2 a linear + a^2 square."""

    constant: float
    linear: float
    square: float

    def of(self, step: float) -> float:
        """Return the error of a step, at least 0 despite rounding."""
        return max(self.constant - 2 * step * self.linear + step * step * self.square, 0.0)


@dataclass(frozen=True, slots=True)
class Guard:
    """The step taken, and each domain's held-out error as a share of its output energy."""

    step: float
    error_before: PerDomain
    error_after: PerDomain


def least_squares(
    reader_HF: Float[Tensor, "H F"],
    gram: Gram,
    keep: Int64[Tensor, " S"],
    damping: float,
    cross_FH: Float[Tensor, "F H"] | None = None,
    mix: float = 0.0,
) -> Float[Tensor, "H S"]:
    """Return the remaining weights by ridge least squares, centred on the old ones.

    W_S' = argmin |y + mix r - x_S W_S'|^2 + sum_j ridge_j |W_j' - W_j|^2 with y = x W, r the drift
    (`cross_FH` = x'r) and ridge_j = damping * G_jj, see `ridge_of`, so W_S' = W_S + (W_C G_CS + mix
    (x_S' r)') (G_SS + diag(ridge_S))^-1. No column gone and no mix: exactly no change. Solved by
    Cholesky in float64: with every channel scaled to size 1 the condition of the system is at most
    1 / damping. Raises NumericsError if it is not positive definite, as with a damping near the
    rounding of the sums, below 1e-6. Source: Hassibi and Stork 1993, in closed form.
    """
    removed = complement(keep, gram.size)
    if not len(removed) and (cross_FH is None or not mix):
        return reader_HF
    device = float64_device(gram.device)
    # Column-major, for LAPACK. Change the device first: not every device has float64.
    right_SH = (reader_HF[:, removed].to(device).to(torch.float64) @ gram.part(removed, keep)).mT
    if cross_FH is not None and mix:
        right_SH.add_(cross_FH[keep].to(device), alpha=mix)
    block_SS = gram.part(keep, keep)
    block_SS.diagonal().add_(ridge_of(gram, damping)[keep.to(device)])
    factor_SS = cholesky_of(
        block_SS,
        f"repair.damping: least squares has no solution with {damping:g}; raise it, or use more "
        "calibration tokens.",
    )
    # cholesky_solve cannot work in place.
    torch.linalg.solve_triangular(factor_SS, right_SH, upper=False, out=right_SH)
    torch.linalg.solve_triangular(factor_SS.mT, right_SH, upper=True, out=right_SH)
    del block_SS, factor_SS
    return reader_HF[:, keep].add_(right_SH.T.float().to(reader_HF.device))


def held_out_sums(
    lost_TH: Float[Tensor, "T H"], correction_TH: Float[Tensor, "T H"], output_energy: float
) -> HeldOutSums:
    """Return the sums over tokens that a `HeldOutError` needs.

    `lost_TH` = x_C W_C': what the cut takes from the output. `correction_TH`: what the fit returns.
    """
    lost, correction = lost_TH.flatten(), correction_TH.flatten()
    pairs = (lost, lost), (lost, correction), (correction, correction)
    dots = [torch.linalg.vecdot(*pair).item() for pair in pairs]
    return torch.tensor([*dots, output_energy], dtype=torch.float64)


def sums_of(parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]]) -> dict[str, HeldOutSums]:
    """Return each domain's `held_out_sums`, of the output itself, what it lost and what the fit
    returns, in pieces.
    """
    sums: dict[str, HeldOutSums] = {}
    for domain, pieces in parts.items():
        own_TH, lost_TH, given_TH = (
            torch.cat(tensors).float() for tensors in zip(*pieces, strict=True)
        )
        sums[domain] = held_out_sums(lost_TH, given_TH, float(own_TH.square().sum()))
    return sums


def held_out_errors(sums: dict[str, HeldOutSums]) -> dict[str, HeldOutError]:
    """Return each domain's |lost - a correction|^2 / output energy, from all ranks' `sums`."""
    errors: dict[str, HeldOutError] = {}
    for domain, total in totals(sums).items():
        *dots, energy = total.tolist()
        errors[domain] = HeldOutError(*(dot / max(energy, 1e-30) for dot in dots))
    return errors


def guard(errors: dict[str, HeldOutError]) -> Guard:
    """Choose the largest step of 1, 1/2, 1/4 that raises no domain's held-out error, else 0."""
    before = {name: error.of(0.0) for name, error in errors.items()}
    for step in GUARD_STEPS:
        after = {name: error.of(step) for name, error in errors.items()}
        if all(after[name] <= before[name] for name in after):
            return Guard(step, before, after)
    return Guard(0.0, before, before)


class Repaired(NamedTuple):
    """The compensation of a reader: weights of its remaining columns, and the verdict."""

    weight_HS: Tensor | None = None
    guard: Guard | None = None


def repair(
    reader: nn.Linear, measured: GroupStatistics, columns: Int64[Tensor, " S"], method: Method
) -> Repaired:
    """Return the repair that the method asks for; an empty one if every column stays."""
    if len(columns) == reader.in_features:
        return Repaired()
    weight_HF = reader.weight.float()
    if method.compensate != "least_squares":
        return Repaired(
            guard=_judge(weight_HF, columns, measured, torch.zeros_like(weight_HF[:, columns]), 0.0)
        )

    # Fit, as far as held-out text allows.
    gram, cross_FH = measured.pooled.gram, measured.pooled.cross_FH
    mix = method.target_mix if cross_FH is not None else 0.0
    new_HS = decided(
        partial(least_squares, weight_HF, gram, columns, method.damping, cross_FH, mix)
    )
    # The guard judges the weights as stored, rounding included.
    old_HS, new_HS = weight_HF[:, columns], new_HS.copy_(new_HS.to(reader.weight.dtype))
    judged = _judge(weight_HF, columns, measured, new_HS - old_HS, mix)
    stored_HS = {0.0: None, 1.0: new_HS}.get(judged.step, old_HS + judged.step * (new_HS - old_HS))
    return Repaired(stored_HS, judged)


def weight_replaced(
    reader: nn.Linear, weight_HF: Float[Tensor, "H F"]
) -> AbstractContextManager[None]:
    """Give the reader this weight within the context."""
    return replaced(reader._parameters, "weight", nn.Parameter(weight_HF, requires_grad=False))


def _judge(
    weight_HF: Tensor, columns: Tensor, measured: GroupStatistics, change_HS: Tensor, mix: float
) -> Guard:
    """Return the guard's verdict on a change of the columns that stay."""
    removed = complement(columns, weight_HF.shape[1])
    gone_HC = weight_HF[:, removed]
    change_SH, sums = change_HS.T, {}
    for name, x_TF in measured.held_out_TF.items():
        dtype, x_TF = x_TF.dtype, x_TF.float()
        with exact_product_precision(dtype):
            lost_TH = x_TF[:, removed] @ gone_HC.T
            energy = float(torch.linalg.vector_norm(x_TF @ weight_HF.T).square())
        given_TH = x_TF[:, columns] @ change_SH
        if mix:
            lost_TH.add_(measured.held_out_drift_TH[name], alpha=mix)
        sums[name] = held_out_sums(lost_TH, given_TH, energy)
    return guard(held_out_errors(sums))
