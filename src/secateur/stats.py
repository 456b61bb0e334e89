"""Statistics of a reader's inputs, per domain, and their pooling over domains.

In: a reader's input x and output y, batch by batch. Out: token mass, sums, output energy and the Gram matrix. All are
sums, so batches, halves and domains merge by adding. Accumulated in float32.

Letters: T tokens, F reader inputs (units x rows per unit), H reader outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# The Gram matrix is symmetric: block rows up to the diagonal cost (1 + 1/4) / 2 of the whole product.
NUM_GRAM_BLOCKS = 4


@dataclass(slots=True)
class Statistics:
    """Weighted sums over tokens: `mass` = sum w, `sum_F` = sum w x, `energy` = sum w |y|^2, `gram_FF` = sum w x x'.

    `gram_FF` is None where a score needs moments alone; then `sum_squares_F` = sum w x^2 stands in for its diagonal.
    The Gram matrix is held as its lower block triangle until `full_gram` mirrors it.
    """

    mass: float
    sum_F: Tensor
    sum_squares_F: Tensor
    energy: Tensor
    gram_FF: Tensor | None

    @classmethod
    def empty(cls, num_inputs: int, device: torch.device, *, gram: bool) -> "Statistics":
        """Return statistics of no tokens."""
        zeros = torch.zeros(num_inputs, device=device)
        square = torch.zeros(num_inputs, num_inputs, device=device) if gram else None
        return cls(0.0, zeros, zeros.clone(), torch.zeros((), device=device), square)

    def update(self, x_TF: Float[Tensor, "T F"], y_TH: Float[Tensor, "T H"]) -> None:
        """Add one batch of reader inputs and outputs (the output without its bias)."""
        x = x_TF.float()
        self.mass += len(x)
        self.sum_F += x.sum(dim=0)
        self.sum_squares_F += x.square().sum(dim=0)
        self.energy += y_TH.float().square().sum()
        if self.gram_FF is not None:
            with exact_product_precision(x_TF.dtype):
                _add_gram(self.gram_FF, x)

    def merge(self, other: "Statistics", weight: float = 1.0) -> None:
        """Add `weight` times another set of tokens; weight 1 gives what one pass over both would have given."""
        self.mass += weight * other.mass
        self.sum_F.add_(other.sum_F, alpha=weight)
        self.sum_squares_F.add_(other.sum_squares_F, alpha=weight)
        self.energy.add_(other.energy, alpha=weight)
        if self.gram_FF is not None and other.gram_FF is not None:
            self.gram_FF.add_(other.gram_FF, alpha=weight)

    def clear(self) -> None:
        """Forget every token, keeping the memory."""
        self.mass = 0.0
        for tensor in (self.sum_F, self.sum_squares_F, self.energy, self.gram_FF):
            if tensor is not None:
                tensor.zero_()

    def is_finite(self) -> bool:
        """Say whether every sum is finite: a NaN or infinite input shows in the sum of squares."""
        return bool(torch.isfinite(self.sum_squares_F).all() and torch.isfinite(self.energy))

    @property
    def mean_F(self) -> Float[Tensor, " F"]:
        """Mean input per channel."""
        return self.sum_F / self.mass

    @property
    def mean_square_F(self) -> Float[Tensor, " F"]:
        """Mean squared input per channel."""
        return self.sum_squares_F / self.mass

    @property
    def variance_F(self) -> Float[Tensor, " F"]:
        """Variance per channel, clipped at zero against rounding."""
        return (self.mean_square_F - self.mean_F.square()).clamp_min(0)

    def full_gram(self) -> Float[Tensor, "F F"]:
        """Mirror the lower block triangle in place and return the whole symmetric Gram matrix."""
        assert self.gram_FF is not None
        for start, stop in _gram_blocks(len(self.gram_FF)):
            self.gram_FF[start:stop, stop:] = self.gram_FF[stop:, start:stop].T
        return self.gram_FF


def domain_weight(weighting: str, share: float, statistics: Statistics) -> float:
    """Return the factor of one domain's sums in the pooled ones.

    `tokens`: 1, raw pooling. `energy`: share_d / e_d with e_d the domain's output energy sum |y|^2, so that a loud
    domain does not decide everything; equal shares give every domain the same say. A silent domain (e_d = 0) gets 0.
    """
    if weighting == "tokens":
        return 1.0
    energy = float(statistics.energy)
    return share / energy if energy > 0 else 0.0


@contextmanager
def exact_product_precision(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 copies of bfloat16 values on the bfloat16 units, accumulating in float32.

    A bfloat16 value loses nothing in that conversion, so only the order of float32 additions differs; about twice as
    fast on processors that have such units. Other dtypes multiply in full float32.
    """
    if dtype != torch.bfloat16:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _add_gram(gram_FF: Float[Tensor, "F F"], x_TF: Float[Tensor, "T F"]) -> None:
    for start, stop in _gram_blocks(len(gram_FF)):
        gram_FF[start:stop, :stop].addmm_(x_TF[:, start:stop].T, x_TF[:, :stop])


def _gram_blocks(size: int) -> list[tuple[int, int]]:
    step = -(-size // NUM_GRAM_BLOCKS)
    return [(start, min(start + step, size)) for start in range(0, size, step)]
