"""Greedy batched OBS (optimal brain surgeon): choose units to remove, refitting the reader after every batch.

In: a reader's weight, the damped Gram matrix of its inputs, the columns of each unit. Out: the units to keep and the
error curve. The refitted weights are not returned: `compensate` solves for them once, exactly.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.score import inverse_of, removal_errors

# Every batch rewrites F^2 numbers, so their number, not their size, must be bounded for wide readers.
MIN_BATCH_COLUMNS, MAX_BATCHES = 32, 48


@dataclass(frozen=True, slots=True)
class ObsSelection:
    """`keep`: sorted units that stay. `scores_U`: all units' scores before any removal.

    `removed`: the units that go, in order of removal. `error_curve[k]`: squared output error after k+1 batches, the
    other columns refitted.
    """

    keep: Tensor
    scores_U: Tensor
    removed: Tensor
    error_curve: Tensor


def units_at_once(asked_columns: int | None, num_columns: int, width: int) -> int:
    """Return how many units of `width` columns go between two updates.

    `asked_columns`: the recipe's `obs_batch`; None: a 48th of the reader's `num_columns`, and at least 32.
    """
    return max(1, (asked_columns or max(MIN_BATCH_COLUMNS, num_columns // MAX_BATCHES)) // width)


def greedy_obs(
    reader_HF: Float[Tensor, "H F"],
    hessian_FF: Float[Tensor, "F F"],
    columns_UW: Int64[Tensor, "U w"],
    num_keep: int,
    batch: int,
) -> ObsSelection:
    """Remove the units of least `removal_errors`, `batch` at a time, until `num_keep` stay.

    After a batch with columns M, A = ([H^-1]_MM)^-1:  error += tr(W_M A W_M');  W -= W_M A [H^-1]_M;
    H^-1 -= [H^-1]_M' A [H^-1]_M. With batch 1 every step is the exact best single removal. `hessian_FF` is overwritten;
    all runs on its device and solves in its dtype, and what is returned is on the reader's.
    Source: Hassibi and Stork 1993; block update as in Frantar and Alistarh, OBC, arXiv 2208.11580, eq. 7.
    """
    inverse = inverse_of(hessian_FF)
    # Float32 is enough for the weights, which only rank; the inverse would lose its small pivots in it.
    weight = reader_HF.to(hessian_FF.device, torch.float32, copy=True)
    columns_UW = columns_UW.to(weight.device)
    active = torch.ones(len(columns_UW), dtype=torch.bool, device=weight.device)
    num_left, error, curve, order = len(columns_UW), inverse.new_zeros(()), [], []
    first_scores = removal_errors(weight, inverse, columns_UW)
    while num_left > num_keep:
        scores = removal_errors(weight, inverse, columns_UW)
        scores[~active] = torch.inf
        size = min(batch, num_left - num_keep)
        units = torch.sort(scores, stable=True).indices[:size].sort().values
        columns = columns_UW[units].flatten()
        rows = inverse[columns]
        gain = torch.linalg.solve(rows[:, columns], rows)  # A [H^-1]_M
        gone = weight[:, columns].to(rows.dtype)
        error = error + (gone * torch.linalg.solve(rows[:, columns], gone.T).T).sum()
        weight.addmm_(weight[:, columns], gain.float(), alpha=-1)
        inverse.addmm_(rows.T, gain, alpha=-1)
        # Exact zeros would divide by zero above; the removed columns are masked, so any positive value serves.
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse.diagonal()[columns] = 1.0
        active[units] = False
        num_left -= size
        curve.append(error)
        order.append(units)
    removed = torch.cat(order) if order else columns_UW.new_zeros(0)
    errors, home = torch.stack(curve) if curve else inverse.new_zeros(0), reader_HF.device
    return ObsSelection(active.nonzero().flatten().to(home), first_scores.float().to(home), removed.to(home), errors)
