"""What the kernels must compute, from their formulae: float64, plain loops, nothing of the product imported.

T tokens, F channels of a reader with H outputs, S channels that stay, U units, E experts, D hidden size.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

import numpy as np

Array, Units = np.ndarray, Sequence[Sequence[int]]

# --- methods: which units go, what the rest becomes ---------------------------------------------------------------

GUARD_STEPS = (1.0, 0.5, 0.25)


def ridge(gram_FF: Array, damping: float) -> Array:
    """The ridge of each channel: its own energy's share, a trace of the mean if it is silent.

    1 for all if no channel has any input.
    """
    energies = [gram_FF[channel, channel] for channel in range(len(gram_FF))]
    mean = sum(energies) / len(energies)
    return np.array([damping * max(each, mean / 2**64) if mean > 0 else 1.0 for each in energies])


def rounded(numbers: Array, dtype: str) -> Array:
    """The numbers as float32, float16 or bfloat16 stores them: the nearest, halves to even."""
    if dtype != "bfloat16":
        return numbers.astype(dtype).astype(np.float64)
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    half_up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return half_up.astype(np.uint32).view(np.float32).astype(np.float64)


def domain_factor(weighting: str, share: float, energy: float) -> float:
    """How much a domain's tokens count: all alike, or so that its output energy becomes its share."""
    if weighting == "tokens":
        return 1.0
    return share / energy if energy > 0 else 0.0


def pooled(parts: Mapping[str, Sequence[Array]], factors: Mapping[str, float]) -> list[Array]:
    """All domains' tokens below each other, every row times the root of its domain's factor."""
    columns = zip(*([part * factors[name] ** 0.5 for part in each] for name, each in parts.items()), strict=True)
    return [np.concatenate(each) for each in columns]


def refit(reader_HF: Array, x_TF: Array, keep: Sequence[int], ridge_F: Array, extra_TH: Array | float = 0.0) -> Array:
    """argmin over V of |x W' + extra - x_S V'|^2 + sum_j ridge_j |V_j - W_j|^2, as one tall system."""
    keep, root = list(keep), np.sqrt(ridge_F[list(keep)])
    rows = np.concatenate([x_TF[:, keep], np.diag(root)])
    targets = np.concatenate([x_TF @ reader_HF.T + extra_TH, root[:, None] * reader_HF[:, keep].T])
    return np.linalg.lstsq(rows, targets, rcond=None)[0].T


def removal_change(reader_HF: Array, hessian_FF: Array, gone: Sequence[int]) -> Array:
    """The change D of least tr(D H D') that takes the columns `gone` to zero."""
    keep = [column for column in range(reader_HF.shape[1]) if column not in gone]
    change = np.zeros_like(reader_HF)
    change[:, gone] = -reader_HF[:, gone]
    if keep:
        inner, outer = hessian_FF[np.ix_(keep, keep)], hessian_FF[np.ix_(gone, keep)]
        change[:, keep] = -np.linalg.solve(inner, (change[:, gone] @ outer).T).T
    return change


def removal_error(reader_HF: Array, hessian_FF: Array, gone: Iterable[int]) -> float:
    """The least tr(D H D') of a change D that takes the columns `gone` to zero."""
    change = removal_change(reader_HF, hessian_FF, list(gone))
    return float(np.trace(change @ hessian_FF @ change.T))


def greedy_errors(reader_HF: Array, hessian_FF: Array, units: Units, gone: Sequence[int]) -> dict[int, float]:
    """What the error becomes if, after the units `gone`, one more goes and the rest is refitted: by unit."""
    before = [column for unit in gone for column in units[unit]]
    left = [unit for unit in range(len(units)) if unit not in gone]
    return {unit: removal_error(reader_HF, hessian_FF, [*before, *units[unit]]) for unit in left}


def greedy_obs(reader_HF: Array, hessian_FF: Array, units: Units, num_keep: int, batch: int) -> list[list[int]]:
    """The units that go, batch by batch: each time those of least error; the lower number first."""
    batches: list[list[int]] = []
    gone: list[int] = []
    while len(units) - len(gone) > num_keep:
        errors = greedy_errors(reader_HF, hessian_FF, units, gone)
        order = sorted(errors, key=lambda unit: (errors[unit], unit))
        batches.append(sorted(order[: min(batch, len(order) - num_keep)]))
        gone += batches[-1]
    return batches


def output_error(
    reader_HF: Array, x_TF: Array, keep: Sequence[int], new_HS: Array, *, extra_TH: Array | float = 0.0
) -> float:
    """|y + extra - (x_S V' + b)|^2 over |y|^2, y = x W'."""
    own_TH = x_TF @ reader_HF.T
    missing_TH = own_TH + extra_TH - x_TF[:, list(keep)] @ new_HS.T
    return float((missing_TH**2).sum()) / max(float((own_TH**2).sum()), 1e-30)


def guard(error_of: Callable[[float], dict[str, float]]) -> float:
    """The first step of 1, 1/2, 1/4 at which no domain has a larger error than at 0; else 0."""
    before = error_of(0.0)
    for step in GUARD_STEPS:
        after = error_of(step)
        if all(after[name] <= before[name] for name in before):
            return step
    return 0.0


def unit_scores(name: str, reader_HF: Array, x_TF: Array, mass: float, units: Units, writers_U: Array) -> list[float]:
    """The score of every unit. `x_TF`: rows times the root of their weight; `mass`: the sum of weights."""
    square_F, norm_F = (x_TF**2).sum(axis=0) / mass, (reader_HF**2).sum(axis=0)
    scores = []
    for unit, columns in enumerate(units):
        if name == "magnitude":
            scores.append(math.sqrt(sum(norm_F[j] for j in columns) + writers_U[unit]))
        elif name == "wanda":
            scores.append(sum(np.abs(reader_HF[:, j]).sum() * math.sqrt(square_F[j]) for j in columns))
        elif name == "paper":
            scores.append(math.sqrt(sum(square_F[j] * norm_F[j] for j in columns)))
        else:
            raise ValueError(name)
    return scores


def flap_scores(reader_HF: Array, mean_F: Array, mean_square_F: Array, units: Units) -> list[float]:
    """var(x_j) |W_j|^2, summed over a unit's columns."""
    var_F, norm_F = mean_square_F - mean_F**2, (reader_HF**2).sum(axis=0)
    return [sum(var_F[j] * norm_F[j] for j in columns) for columns in units]


# --- methods: budgets by brute force -------------------------------------------------------------------------------


def nearest(width: float, step: int, num_units: int, allows: Callable[[int], bool] = lambda _: True) -> int:
    """The multiple of `step` nearest to the width (halves to even), no more than all; else the nearest allowed."""
    below, half = divmod(Fraction(width), step)
    above = 2 * half > step or (2 * half == step and below % 2 == 1)
    best = min((int(below) + above) * step, num_units)
    if best >= step and allows(best):
        return best
    counts = [count for count in range(step, num_units, step) if allows(count)]
    return min([*counts, num_units], key=lambda count: (abs(Fraction(width) - count), count))


def smallest(num_units: int, step: int, allows: Callable[[int], bool] = lambda _: True) -> int:
    """The least count that may stay: a multiple of `step` that the config can state."""
    for count in range(step, num_units, step):
        if allows(count):
            return count
    return num_units


def curve(
    levels: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    prices: Sequence[int],
    target: int,
    accept: Callable[[tuple[int, ...]], bool] = lambda _: True,
) -> tuple[float, list[tuple[int, ...]]]:
    """The least loss of a choice of one level per group that removes `target`, and all choices that have it."""
    best, found = math.inf, []
    for options in itertools.product(*(range(len(each)) for each in levels)):
        removed = sum((levels[g][0] - levels[g][o]) * prices[g] for g, o in enumerate(options))
        if removed < target or not accept(options):
            continue
        loss = sum(losses[g][o] for g, o in enumerate(options))
        if loss < best - 1e-12:
            best, found = loss, []
        if loss <= best + 1e-12:
            found.append(options)
    return best, found


# --- methods: experts ----------------------------------------------------------------------------------------------


def routing(chosen_Tk: Array, weights_Tk: Array, outputs_ETD: Array) -> tuple[Array, Array, Array]:
    """Per expert: tokens that chose it, sum of |g f|, sum of |g f|^2; `outputs_ETD`: each expert's f of each token."""
    found = np.zeros((3, len(outputs_ETD)))
    for token, (chosen_k, weights_k) in enumerate(zip(chosen_Tk, weights_Tk, strict=True)):
        for expert, weight in zip(chosen_k, weights_k, strict=True):
            norm = abs(weight) * math.sqrt((outputs_ETD[expert, token] ** 2).sum())
            found[:, expert] += (1, norm, norm**2)
    return found[0], found[1], found[2]


def expert_scores(
    name: str, routed: Mapping[str, tuple[Array, Array, Array]], shares: Mapping[str, float], weighting: str
) -> list[float]:
    """energy or reap of every expert from each domain's counts, norms and energies."""
    num_experts = len(next(iter(routed.values()))[0])
    scores = []
    for expert in range(num_experts):
        upper = lower = 0.0
        for domain, (tokens_E, norms_E, energy_E) in routed.items():
            if name == "energy":
                upper += domain_factor(weighting, shares[domain], energy_E.sum()) * energy_E[expert]
            else:
                factor = domain_factor(weighting, shares[domain], norms_E.sum())
                upper, lower = upper + factor * norms_E[expert], lower + factor * tokens_E[expert]
        scores.append(upper if name != "reap" else upper / lower if lower > 0 else 0.0)
    return scores


def best_step(error_of: Callable[[float], dict[str, float]]) -> float:
    """The step of 1, 1/2, 1/4, 0 with the least error over that at 0, summed over domains; the largest of equals."""
    before, found, least = error_of(0.0), 0.0, math.inf
    for step in (*GUARD_STEPS, 0.0):
        after = error_of(step)
        rise = sum(after[name] / before[name] if before[name] else 1 + after[name] for name in before)
        if rise < least:
            found, least = step, rise
    return found


def few_token_factor(num_tokens: int, num_channels: int) -> float:
    """How often the damping is taken for an expert with less than ten tokens a channel."""
    return max(1.0, 10 * num_channels / num_tokens)


def shrunk(own_FF: Array, everyone_FF: Array, num_tokens: int) -> Array:
    """(1 - a) G / tr G + a P / tr P, a = F / (F + n); G itself from 10 F tokens on."""
    num_channels = len(own_FF)
    if num_tokens >= 10 * num_channels:
        return own_FF
    share, mixed = num_channels / (num_channels + num_tokens), np.zeros_like(own_FF)
    for gram_FF, weight in ((own_FF, 1 - share), (everyone_FF, share)):
        if np.trace(gram_FF) > 0:
            mixed += weight * gram_FF / np.trace(gram_FF)
    return mixed
