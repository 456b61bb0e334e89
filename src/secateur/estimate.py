"""Estimate before a run: bytes of memory and of the result, from shapes alone.

In: a bound architecture, a resolved recipe, the model's config. Out: bytes by part. The parts that stand together at
the worst moment, the solve of the widest group, are summed to the peak; the interpreter itself is not counted.
"""

from dataclasses import dataclass
from typing import Any

from secateur.resolve import Resolved
from secateur.score import NEED_GRAM

# Held-out blocks come on top of the calibration tokens: one for every nine.
HELD_OUT_FACTOR = 10 / 9


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by part; `statistics` and `solve` are of the widest group."""

    weights: int
    hidden_states: int
    statistics: int
    solve: int

    @property
    def peak(self) -> int:
        """Statistics of a domain are freed before the solve, so the larger of the two counts."""
        return self.weights + self.hidden_states + max(self.statistics, self.solve)


def estimate_memory(resolved: Resolved, config: Any, weight_bytes: int, bytes_per_param: int) -> MemoryEstimate:
    """Return the bytes that the run needs beyond the interpreter.

    hidden: tokens x hidden size in the model's dtype. statistics: two float32 Gram matrices (pooled and the current
    domain's) and the held-out inputs. solve: the pooled Gram in float32, one float64 copy, its inverse and the reader.
    """
    recipe = resolved.recipe
    assert recipe.calibration.num_tokens is not None
    num_tokens = round(recipe.calibration.num_tokens * HELD_OUT_FACTOR)
    widest = max(group.num_units * group.width for group in resolved.groups)
    has_gram = recipe.score in NEED_GRAM or recipe.compensate == "least_squares"
    square = widest * widest if has_gram else 0
    held_out = (num_tokens - recipe.calibration.num_tokens) * widest * bytes_per_param
    reader = widest * config.hidden_size
    return MemoryEstimate(
        weights=weight_bytes,
        hidden_states=num_tokens * config.hidden_size * bytes_per_param,
        statistics=2 * 4 * square + held_out,
        solve=(4 + 2 * 8) * square + held_out + 3 * 8 * reader,
    )
