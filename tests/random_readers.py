"""Random reader inputs for hypothesis, degenerate ones too; float32 numbers, as a model gives them."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, composite

DEFECTS = ("dead", "duplicate", "constant", "loud", "opposite")


@dataclass(frozen=True, slots=True)
class Reader:
    """A reader's weight, and by domain its inputs and a drift of its outputs; one more of each is held out."""

    weight_HF: np.ndarray
    inputs_TF: dict[str, np.ndarray]
    drift_TH: dict[str, np.ndarray]
    held_out_TF: dict[str, np.ndarray]
    held_out_drift_TH: dict[str, np.ndarray]
    shares: dict[str, float]


def damaged(x_TF: np.ndarray, defects: list[tuple[str, int, int]]) -> np.ndarray:
    """Make channels dead, constant, loud, or the same as (the opposite of) another one."""
    for defect, channel, other in defects:
        if defect == "loud":
            x_TF[:, channel] *= 300
        elif defect == "duplicate":
            x_TF[:, channel] = x_TF[:, other]
        elif defect == "opposite":
            x_TF[:, channel] = -x_TF[:, other]
        else:
            x_TF[:, channel] = 0 if defect == "dead" else 1.5
    return x_TF


@composite
def readers(draw: DrawFn, *, min_channels: int = 2, max_channels: int = 10, multiple_of: int = 1) -> Reader:
    """One to three domains of one token or more, so that there may be fewer tokens than channels."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    size = multiple_of * draw(st.integers(-(-min_channels // multiple_of), max_channels // multiple_of))
    num_outputs = draw(st.integers(1, 5))
    channel = st.integers(0, size - 1)
    defects = draw(st.lists(st.tuples(st.sampled_from(DEFECTS), channel, channel), max_size=3))
    # So that neighbours know of each other.
    mix_FF = np.eye(size) + draw(st.sampled_from([0.0, 0.5])) * rng.standard_normal((size, size))
    names = "abc"[: draw(st.integers(1, 3))]
    loudness = {name: draw(st.sampled_from([1.0, 0.01, 30.0])) for name in names}

    def tokens(name: str, count: int) -> np.ndarray:
        x_TF = rng.standard_normal((count, size)) @ mix_FF + 0.5
        return (loudness[name] * damaged(x_TF, defects)).astype(np.float32)

    def drift(name: str, count: int) -> np.ndarray:
        return (loudness[name] * rng.standard_normal((count, num_outputs))).astype(np.float32)

    counts = {name: draw(st.sampled_from([1, size, 60])) for name in names}
    inputs, held_out = ({name: tokens(name, max(2, n // k)) for name, n in counts.items()} for k in (1, 4))
    drifts, held_out_drifts = ({name: drift(name, len(x)) for name, x in each.items()} for each in (inputs, held_out))
    weights = rng.random(len(names)) + 0.2
    shares = dict(zip(names, (weights / weights.sum()).tolist(), strict=True))
    weight_HF = rng.standard_normal((num_outputs, size)).astype(np.float32)
    return Reader(weight_HF, inputs, drifts, held_out, held_out_drifts, shares)
