"""Greedy batched OBS (optimal brain surgeon): choose channels to remove, refitting the reader after every batch.

In: a reader's weight and the damped Gram matrix of its inputs. Out: the channels to keep and the error curve.
Units are one reader column wide. The refitted weights are not returned: `compensate` solves for them once, exactly.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.score import inverse_of


@dataclass(frozen=True, slots=True)
class ObsSelection:
    """`keep`: sorted channels that stay. `scores_F`: all channels' scores before any removal.

    `error_curve[k]`: squared output error after k+1 batches, the other channels refitted.
    """

    keep: Tensor
    scores_F: Tensor
    error_curve: Tensor


def greedy_obs(
    reader_HF: Float[Tensor, "H F"], hessian_FF: Float[Tensor, "F F"], num_keep: int, batch: int
) -> ObsSelection:
    """Remove the channels of least |W_j|^2 / [H^-1]_jj, `batch` at a time, until `num_keep` stay.

    After a batch M:  A = ([H^-1]_MM)^-1;  error += tr(W_M A W_M');  W -= W_M A [H^-1]_M;  H^-1 -= [H^-1]_M' A [H^-1]_M.
    With batch 1 every step is the exact best single removal. `hessian_FF` is overwritten; solves run in its dtype.
    Source: Hassibi and Stork 1993; block update as in Frantar and Alistarh, OBC, arXiv 2208.11580, eq. 7.
    """
    inverse = inverse_of(hessian_FF)
    # Float32 is enough for the weights, which only rank; the inverse would lose its small pivots in it.
    weight = reader_HF.to(torch.float32, copy=True)
    active = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    num_left, error, curve = weight.shape[1], inverse.new_zeros(()), []
    first_scores = _scores(weight, inverse)
    while num_left > num_keep:
        scores = _scores(weight, inverse)
        scores[~active] = torch.inf
        size = min(batch, num_left - num_keep)
        removed = torch.sort(scores, stable=True).indices[:size].sort().values
        rows = inverse[removed]
        gain = torch.linalg.solve(rows[:, removed], rows)  # A [H^-1]_M
        error = error + _removal_error(weight[:, removed].to(rows.dtype), rows[:, removed])
        weight.addmm_(weight[:, removed], gain.float(), alpha=-1)
        inverse.addmm_(rows.T, gain, alpha=-1)
        # Exact zeros would divide by zero above; the removed channels are masked, so any positive value serves.
        inverse.diagonal()[removed] = 1.0
        active[removed] = False
        num_left -= size
        curve.append(error)
    keep = active.nonzero().flatten()
    return ObsSelection(keep, first_scores, torch.stack(curve) if curve else inverse.new_zeros(0))


def _scores(weight_HF: Float[Tensor, "H F"], inverse_FF: Float[Tensor, "F F"]) -> Float[Tensor, " F"]:
    # The norm needs no squared copy of the weights.
    return torch.linalg.vector_norm(weight_HF, dim=0).square() / inverse_FF.diagonal()


def _removal_error(weight_HM: Float[Tensor, "H M"], inverse_MM: Float[Tensor, "M M"]) -> Float[Tensor, ""]:
    """Return tr(W_M ([H^-1]_MM)^-1 W_M')."""
    return (weight_HM * torch.linalg.solve(inverse_MM, weight_HM.T).T).sum()
