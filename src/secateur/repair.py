"""Repair a reader after units have been chosen to go: compensate, then let held-out text judge.

In: the reader, its measurement, the columns that stay. Out: new weights for those columns or a bias, and what the
held-out text says of them. Nothing is cut here.

Letters: H reader outputs, F reader inputs, S inputs that stay.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.compensate import Guard, guard, held_out_errors, held_out_sums, least_squares, mean_shift
from secateur.gram import exact_product_precision
from secateur.measure import Measurement
from secateur.selection import Method
from secateur.stats import Decide, here


@dataclass(frozen=True, slots=True)
class Repair:
    """What compensation does to a reader: new weights for its remaining columns, a bias, and how it was reached."""

    weight_HS: Tensor | None = None
    bias_H: Tensor | None = None
    guard: Guard | None = None
    damping: float | None = None
    condition: float | None = None


def repair(
    reader: nn.Linear, measured: Measurement, columns: Int64[Tensor, " S"], method: Method, decide: Decide = here
) -> Repair:
    """Return the repair that the method asks for; an empty one where every column stays."""
    if len(columns) == reader.in_features:
        return Repair()
    weight_HF, dtype = reader.weight.float(), reader.weight.dtype
    if method.compensate == "least_squares":
        return _least_squares(weight_HF, dtype, measured, columns, method, decide)
    old_HS = weight_HF[:, columns]
    if method.compensate == "none":
        return Repair(guard=_judge(weight_HF, columns, measured, old_HS, old_HS))
    shift_H = decide(lambda: mean_shift(weight_HF, measured.pooled.mean_F, columns)).to(dtype).float()
    judged = _judge(weight_HF, columns, measured, old_HS, old_HS, shift_H=shift_H)
    return Repair(bias_H=judged.step * shift_H, guard=judged)


def _least_squares(
    weight_HF: Tensor, dtype: torch.dtype, measured: Measurement, columns: Tensor, method: Method, decide: Decide
) -> Repair:
    """Fit with each damping of the grid and keep the one that the held-out text likes best, the first on a tie."""
    mix = method.target_mix if measured.pooled.cross_FH is not None else 0.0
    gram, best, best_error = measured.pooled.gram, Repair(), torch.inf
    assert gram is not None
    for factor in method.damping_factors:
        damping, cross_FH = method.damping * factor, measured.pooled.cross_FH
        fit = decide(partial(least_squares, weight_HF, gram, columns, damping, cross_FH, mix))
        # The guard judges what will be stored, rounding included.
        old_HS, new_HS = weight_HF[:, columns], fit.weight_HS.copy_(fit.weight_HS.to(dtype))
        judged = _judge(weight_HF, columns, measured, old_HS, new_HS, mix=mix)
        error = sum(judged.error_after.values())
        if error < best_error:
            stored_HS = {0.0: None, 1.0: new_HS}.get(judged.step, old_HS + judged.step * (new_HS - old_HS))
            best, best_error = Repair(stored_HS, None, judged, fit.damping, fit.condition), error
    return best


def _judge(
    weight_HF: Float[Tensor, "H F"],
    columns: Int64[Tensor, " S"],
    measured: Measurement,
    old_HS: Float[Tensor, "H S"],
    new_HS: Float[Tensor, "H S"],
    *,
    shift_H: Float[Tensor, " H"] | None = None,
    mix: float = 0.0,
) -> Guard:
    is_gone = torch.ones(weight_HF.shape[1], dtype=torch.bool, device=weight_HF.device)
    is_gone[columns] = False
    gone = is_gone.nonzero().flatten()
    gone_HC = weight_HF[:, gone]
    change_SH, sums = (new_HS - old_HS).T, {}
    for name, x_TF in measured.held_out_TF.items():
        dtype, x_TF = x_TF.dtype, x_TF.float()
        with exact_product_precision(dtype):
            lost_TH = x_TF[:, gone] @ gone_HC.T
            energy = float(torch.linalg.vector_norm(x_TF @ weight_HF.T).square())
        given_TH = x_TF[:, columns] @ change_SH
        if shift_H is not None:
            given_TH += shift_H
        if mix:
            lost_TH.add_(measured.held_out_drift_TH[name], alpha=mix)
        sums[name] = held_out_sums(lost_TH, given_TH, energy)
    return guard(held_out_errors(sums))
