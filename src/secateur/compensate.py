"""Compensation: change the reader's remaining weights so that its output is closest to what it was.

In: the reader's weight, statistics of its input on the pruned stream, the channels that stay. Out: new weights for
those channels, guarded on held-out text that no statistic has seen. The target is the same layer's own output before
the cut; fitting to the dense stream's output was measured harmful.

Letters: T tokens, H reader outputs, F reader inputs, S inputs that stay, C inputs that go.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.errors import NumericsError
from secateur.score import ridge_of

# Fractions of a correction that the guard tries, largest first; 0 means the old weights stay.
GUARD_STEPS = (1.0, 0.5, 0.25)
MAX_DAMPING_RETRIES = 3


@dataclass(frozen=True, slots=True)
class Fit:
    """`weight_HS`: remaining columns, refitted. `damping`: the relative ridge it took. `condition`: of the solve."""

    weight_HS: Tensor
    damping: float
    condition: float


@dataclass(frozen=True, slots=True)
class Guard:
    """What the held-out text says of a correction. Errors are shares of the reader's own output energy, by domain."""

    step: float
    error_before: dict[str, float]
    error_after: dict[str, float]


def least_squares(
    reader_HF: Float[Tensor, "H F"], gram_FF: Float[Tensor, "F F"], keep: Int64[Tensor, " S"], damping: float
) -> Fit:
    """Ridge least squares in the remaining weights, centred on the old ones.

    W_S' = argmin |y - x_S W_S'|^2 + ridge |W_S' - W_S|^2 with y = x W and ridge = damping * mean(diag G), so
    W_S' = W_S + W_C G_CS (G_SS + ridge I)^-1. Keep all -> exactly no change. Solved by Cholesky in float64; where that
    fails the damping is raised tenfold, at most three times, and the value used is returned.

    Raises NumericsError if the system stays indefinite. Source: the OBS update in closed form (Hassibi and Stork 1993).
    """
    is_gone = torch.ones(gram_FF.shape[0], dtype=torch.bool, device=keep.device)
    is_gone[keep] = False
    if not is_gone.any():
        return Fit(reader_HF, damping, 1.0)
    gone = is_gone.nonzero().flatten()
    cross_SC = gram_FF[keep[:, None], gone].double()
    right_SH = cross_SC @ reader_HF[:, gone].T.double()
    for attempt in range(MAX_DAMPING_RETRIES + 1):
        used = damping * 10**attempt
        block = _damped_block(gram_FF, keep, used).mT  # column-major, so that LAPACK works in place
        failed = torch.zeros((), dtype=torch.int32, device=block.device)
        factor, _ = torch.linalg.cholesky_ex(block, out=(block, failed))
        if not failed:
            change_SH = torch.cholesky_solve(right_SH, factor)
            pivots = factor.diagonal()
            return Fit(reader_HF[:, keep] + change_SH.T.float(), used, float((pivots.max() / pivots.min()) ** 2))
    highest = damping * 10**MAX_DAMPING_RETRIES
    raise NumericsError(f"least squares has no solution even with damping {highest:g}; use more calibration tokens.")


def mean_shift(
    reader_HF: Float[Tensor, "H F"], mean_F: Float[Tensor, " F"], keep: Int64[Tensor, " S"]
) -> Float[Tensor, " H"]:
    """Return the bias that stands in for the removed channels' mean output: b = W_C mean(x_C).

    Source: An et al., FLAP, arXiv 2312.11983, eq. 8.
    """
    gone_mean_F = mean_F.clone()
    gone_mean_F[keep] = 0
    return reader_HF @ gone_mean_F


def guard(
    lost_TH: dict[str, Float[Tensor, "T H"]],
    correction_TH: dict[str, Float[Tensor, "T H"]],
    output_energy: dict[str, float],
) -> Guard:
    """Choose the largest step a of 1, 1/2, 1/4 that raises no domain's held-out error; 0 if none does.

    Per domain, `lost_TH` = x_C W_C' is what the cut takes from the output, `correction_TH` what the compensation gives
    back; the error of step a is |lost - a correction|^2 / output energy, which is what the true output error is.
    """
    errors = {name: _parabola(lost_TH[name], correction_TH[name], max(output_energy[name], 1e-30)) for name in lost_TH}
    before = {name: constant for name, (constant, _, _) in errors.items()}
    for step in GUARD_STEPS:
        after = {name: c - 2 * step * b + step * step * a for name, (c, b, a) in errors.items()}
        if all(after[name] <= before[name] for name in after):
            return Guard(step, before, {name: max(value, 0.0) for name, value in after.items()})
    return Guard(0.0, before, before)


def _damped_block(gram_FF: Float[Tensor, "F F"], keep: Int64[Tensor, " S"], damping: float) -> Float[Tensor, "S S"]:
    block_SS = gram_FF[keep[:, None], keep].double()
    block_SS.diagonal().add_(ridge_of(gram_FF, damping))
    return block_SS


def _parabola(lost_TH: Tensor, correction_TH: Tensor, energy: float) -> tuple[float, float, float]:
    """Return (c, b, a) of error(step) = c - 2 b step + a step^2, all divided by `energy`."""
    constant, linear, square = (
        float((left.double() * right.double()).sum()) / energy
        for left, right in ((lost_TH, lost_TH), (lost_TH, correction_TH), (correction_TH, correction_TH))
    )
    return constant, linear, square
