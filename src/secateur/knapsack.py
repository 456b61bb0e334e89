"""The multiple-choice knapsack: choose one option per group so that enough is removed and least is lost.

In: per group, what each option removes and what it loses. Out: one option per group. Dynamic programme, exact where the
removals have a common step; otherwise each is rounded down to a step of 1/MAX_STEPS of the whole, so that the target is
still met. Ties go to the option named first.
"""

import math
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

MAX_STEPS = 50_000


@dataclass(frozen=True, slots=True)
class _Stage:
    """After one group: the option chosen for each number of steps removed, and where an option came to the end from."""

    choice: NDArray[numpy.int16]
    origin_of_end: list[int]


def least_loss(removals: list[list[int]], losses: list[list[float]], target: int) -> list[int]:
    """Return each group's option so that sum of removals >= target and the sum of losses is least.

    `target` must be at most the sum of each group's largest removal. O(groups x options x steps).
    """
    largest = sum(max(options) for options in removals)
    assert target <= largest
    step = max(math.gcd(*(removal for options in removals for removal in options)), -(-largest // MAX_STEPS), 1)
    steps = [[removal // step for removal in options] for options in removals]
    end = min(-(-target // step), sum(max(options) for options in steps))
    best = numpy.full(end + 1, math.inf)
    best[0] = 0
    stages = []
    for options, option_losses in zip(steps, losses, strict=True):
        best, stage = _add_group(best, options, option_losses)
        stages.append(stage)
    return _read_back(stages, steps, end)


def _add_group(
    best: NDArray[numpy.float64], steps: list[int], losses: list[float]
) -> tuple[NDArray[numpy.float64], _Stage]:
    """Return the least loss by steps removed with this group too; the last entry stands for its number or more."""
    end = len(best) - 1
    after, choice = numpy.full_like(best, math.inf), numpy.zeros(end + 1, dtype=numpy.int16)
    origins = []
    for option, (removed, loss) in enumerate(zip(steps, losses, strict=True)):
        removed = min(removed, end)
        reached = numpy.full_like(best, math.inf)
        reached[removed:] = best[: end + 1 - removed] + loss
        origin = end - removed + int(numpy.argmin(best[end - removed :]))
        reached[end] = best[origin] + loss
        origins.append(origin)
        better = reached < after
        after[better], choice[better] = reached[better], option
    return after, _Stage(choice, origins)


def _read_back(stages: list[_Stage], steps: list[list[int]], end: int) -> list[int]:
    chosen, position = [], end
    for stage, options in zip(reversed(stages), reversed(steps), strict=True):
        option = int(stage.choice[position])
        chosen.append(option)
        position = stage.origin_of_end[option] if position == end else position - options[option]
    return chosen[::-1]
