"""Statistics of a reader's inputs per domain and pooled over domains: sums, Gram matrix, energy."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.errors import NumericsError
from secateur.ranks import domains_ended, from_first, gathered, sum_tensors
from secateur.stream.device import float64_device, release_freed

# Block rows up to the diagonal cost (1 + 1/8) / 2 of the whole product.
NUM_BLOCKS = 8
# Tokens per product that is added to the sum: one CPU batch, or half a device batch, since there
# adding costs more than multiplying fewer.
CPU_PIECE_TOKENS, DEVICE_PIECE_TOKENS = 512, 4096
# A channel of less energy than this share of the mean is silent. It is far below what rounding of
# float32 sums does to any channel, whatever its size, and far above the least float32.
SILENT = 2.0**-64
# Rows of a product computed at a time, to bound memory.
PRODUCT_ROWS = 1024


class Gram:
    """`blocks[b]` holds rows `starts[b]` to `stops[b]`, each up to column `stops[b]`."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Start with zeros. `dtype`: float32 if it only holds a finished sum; None: `sum_dtype`."""
        step = max(1, -(-size // NUM_BLOCKS))
        self.size, self.device = size, device
        self.starts = list(range(0, size, step))
        self.stops = [min(start + step, size) for start in self.starts]
        self.blocks = [
            torch.zeros(stop - start, stop, device=device, dtype=dtype or sum_dtype(device))
            for start, stop in zip(self.starts, self.stops, strict=True)
        ]

    def add_product(self, x_TF: Float[Tensor, "T F"]) -> None:
        """Add x'x."""
        with exact_product_precision(x_TF.dtype):
            for piece_TF in pieces(x_TF):
                x = piece_TF.float()
                for start, stop, block in zip(self.starts, self.stops, self.blocks, strict=True):
                    rows = x[:, start:stop].T.split(PRODUCT_ROWS)
                    for x_RP, sums in zip(rows, block.split(PRODUCT_ROWS), strict=True):
                        sums += x_RP @ x[:, :stop]

    def merge(self, other: "Gram", weight: float) -> None:
        """Add `weight` times another one."""
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            mine.add_(theirs, alpha=weight)

    def clear(self) -> None:
        """Set everything to zero, keeping the memory."""
        for block in self.blocks:
            block.zero_()

    def diagonal(self) -> Float[Tensor, " F"]:
        """Return sum x_j^2 for each input j."""
        return torch.cat(
            [block.diagonal(start) for start, block in zip(self.starts, self.blocks, strict=True)]
        )

    def part(
        self, rows_R: Int64[Tensor, " R"], columns_C: Int64[Tensor, " C"]
    ) -> Float[Tensor, "R C"]:
        """Return a new float64 matrix of these rows and columns (both sorted), on `float64_device`.

        Only half is stored, so entries are mirrored. First returns freed memory to the system.
        """
        release_freed()
        device = float64_device(self.device)
        result_RC = torch.empty(len(rows_R), len(columns_C), dtype=torch.float64, device=device)
        edges = torch.tensor([*self.starts, self.size], device=rows_R.device)
        row_bounds, column_bounds = (
            torch.searchsorted(index, edges).tolist() for index in (rows_R, columns_C)
        )
        for b, (start, block) in enumerate(zip(self.starts, self.blocks, strict=True)):
            (row, row_end), (column, column_end) = row_bounds[b : b + 2], column_bounds[b : b + 2]
            # This block's rows with columns up to its end; then its strictly left part, transposed.
            lower, left = rows_R[row:row_end] - start, columns_C[column:column_end] - start
            result_RC[row:row_end, :column_end] = block[lower][:, columns_C[:column_end]].to(device)
            result_RC[:row, column:column_end] = block[left][:, rows_R[:row]].T.to(device)
        return result_RC

    def full(self) -> Float[Tensor, "F F"]:
        """Return the whole symmetric matrix as a new one, see `part`."""
        everything = torch.arange(self.size, device=self.device)
        return self.part(everything, everything)


def pieces(tensor_TX: Float[Tensor, "T X"]) -> tuple[Tensor, ...]:
    """Return the tokens in pieces that are multiplied at a time."""
    return tensor_TX.split(
        CPU_PIECE_TOKENS if tensor_TX.device.type == "cpu" else DEVICE_PIECE_TOKENS
    )


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over batches: float64, or float32 if the device has none."""
    return torch.float64 if float64_device(device) == device else torch.float32


@contextmanager
def exact_product_precision(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 copies of bfloat16 values on bfloat16 units, accumulating in float32.

    The conversion loses nothing, so only the order of float32 additions differs. On a processor
    without AMX oneDNN has a float32 kernel for this, which is hardly faster. Other dtypes multiply
    in full float32.
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


T = TypeVar("T")

# Takes pooled statistics, which it may fill, and domains' energies; returns the energies.
Hand = Callable[["Statistics", dict[str, float]], dict[str, float]]
# Weightings that need each domain's own statistics.
BY_DOMAIN = frozenset({"minimax"})


@dataclass(slots=True)
class Statistics:
    """Weighted sums over tokens: `mass` = sum w, `sum_F` = sum w x, `energy` = sum w |y|^2.

    `any_gram` = sum w x x', `gram` where it is there; None if a score needs moments only.
    `sum_squares_F` = sum w x^2, its diagonal. `cross_FH` = sum w x r', with r the drift for the
    reader to compensate, if any.
    """

    mass: float
    sum_F: Tensor
    sum_squares_F: Tensor
    energy: Tensor
    any_gram: Gram | None
    cross_FH: Tensor | None = None

    @property
    def gram(self) -> Gram:
        """The Gram matrix, of statistics that have one."""
        assert self.any_gram is not None, "summed for moments only"
        return self.any_gram

    @classmethod
    def empty(
        cls,
        num_inputs: int,
        device: torch.device,
        *,
        gram: bool,
        drift_size: int = 0,
        dtype: torch.dtype | None = None,
    ) -> "Statistics":
        """Return statistics of no tokens. `drift_size`: the outputs of the reader, or 0: no drift.

        `dtype`: of all but the energy; float32 for finished sums only, None for `sum_dtype`.
        """
        options: Any = {"device": device, "dtype": dtype or sum_dtype(device)}
        zeros = torch.zeros(num_inputs, **options)
        square = Gram(num_inputs, **options) if gram else None
        cross_FH = torch.zeros(num_inputs, drift_size, **options) if drift_size else None
        energy = torch.zeros((), device=device, dtype=sum_dtype(device))
        return cls(0.0, zeros, zeros.clone(), energy, square, cross_FH)

    def update(
        self,
        x_TF: Float[Tensor, "T F"],
        y_TH: Float[Tensor, "T H"],
        drift_TH: Float[Tensor, "T H"] | None = None,
    ) -> None:
        """Add a batch of reader inputs, outputs (without bias) and, if used, the drift."""
        self.mass += len(x_TF)
        self.sum_F += x_TF.sum(dim=0, dtype=torch.float32)
        self.energy += torch.linalg.vector_norm(
            y_TH, dtype=torch.promote_types(y_TH.dtype, torch.float32)
        ).square()
        if self.any_gram is None:
            self.sum_squares_F += x_TF.float().square().sum(dim=0)
        else:
            self.gram.add_product(x_TF)
            self.sum_squares_F.copy_(self.gram.diagonal())
        if self.cross_FH is not None:
            assert drift_TH is not None
            with exact_product_precision(x_TF.dtype):
                for x_PF, drift_PH in zip(pieces(x_TF), pieces(drift_TH), strict=True):
                    rows = zip(
                        self.cross_FH.split(PRODUCT_ROWS),
                        x_PF.split(PRODUCT_ROWS, dim=1),
                        strict=True,
                    )
                    for cross_RH, x_PR in rows:
                        cross_RH += x_PR.float().T @ drift_PH.float()

    @property
    def sums(self) -> list[Tensor]:
        """All sums but the mass."""
        blocks = [] if self.any_gram is None else self.any_gram.blocks
        cross = [] if self.cross_FH is None else [self.cross_FH]
        return [self.sum_F, self.sum_squares_F, self.energy, *blocks, *cross]

    def merge(self, other: "Statistics", weight: float = 1.0) -> None:
        """Add `weight` times another set of tokens; weight 1 equals one pass over both."""
        self.mass += weight * other.mass
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            mine.add_(theirs, alpha=weight)

    def sum_over_ranks(self) -> None:
        """Become the sums over all ranks' tokens."""
        mass = torch.tensor([self.mass], dtype=torch.float64)
        sum_over_ranks(mass, *self.sums)
        self.mass = float(mass)

    def clear(self) -> None:
        """Remove every token, keeping the memory."""
        self.mass = 0.0
        for tensor in self.sums:
            tensor.zero_()

    def is_finite(self) -> bool:
        """Say whether every sum is finite; the sum of squares reveals NaN and infinite inputs."""
        return bool(torch.isfinite(self.sum_squares_F).all() and torch.isfinite(self.energy))

    @property
    def mean_F(self) -> Float[Tensor, " F"]:
        """Mean input per channel; 0 if no token counts, as where every domain's output is
        silent.
        """
        return self.sum_F / (self.mass or 1.0)

    @property
    def mean_square_F(self) -> Float[Tensor, " F"]:
        """Mean squared input per channel, see `mean_F`."""
        return self.sum_squares_F / (self.mass or 1.0)

    @property
    def variance_F(self) -> Float[Tensor, " F"]:
        """Variance per channel, clipped at zero against rounding."""
        return (self.mean_square_F - self.mean_F.square()).clamp_min(0)


def domain_weight(weighting: str, share: float, energy: float) -> float:
    """Return the factor of one domain's sums in the pooled ones.

    `tokens`: 1. `energy`: share_d / e_d with the output energy e_d = sum |y|^2, so that a loud
    domain does not dominate; 0 if e_d = 0. `minimax`: like `energy`, to start `minimax_weights`
    from.
    """
    if weighting == "tokens":
        return 1.0
    return share / energy if energy > 0 else 0.0


def pool(by_domain: dict[str, Statistics], weights: dict[str, float]) -> Statistics:
    """Return sum_d q_d S_d / e_d as new statistics; q: the weights, e_d: the output energies."""
    first = next(iter(by_domain.values()))
    drift = 0 if first.cross_FH is None else first.cross_FH.shape[1]
    size, device = len(first.sum_F), first.sum_F.device
    pooled = Statistics.empty(size, device, gram=True, drift_size=drift, dtype=torch.float32)
    for name, statistics in by_domain.items():
        pooled.merge(statistics, domain_weight("energy", weights[name], float(statistics.energy)))
    return pooled


def decided(compute: Callable[[], T], /) -> T:
    """Return on every rank what the first one computes, bit for bit, and give freed memory back to
    the system.
    """
    value = from_first(compute)
    release_freed()
    return value


def sum_over_ranks(*parts: Tensor | Gram) -> None:
    """Make every part the sum over all ranks, in place; a Gram matrix sends its stored triangle."""
    sum_tensors(
        [tensor for part in parts for tensor in (part.blocks if isinstance(part, Gram) else [part])]
    )


def totals(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sums over all ranks of numbers or small tensors by name; ranks may lack names.

    Every rank adds in the order of ranks, so that all get the same bits.
    """
    total: dict[str, Any] = {}
    for part in gathered(dict(values)):
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def of_all_ranks(parts: list[T]) -> list[T]:
    """Return the entries of all ranks, in the order of ranks."""
    return [part for of_rank in gathered(parts) for part in of_rank]


class InOrder:
    """Calls `end` with each domain that is done, in the same order on every rank.

    A rank also hears of domains of which it has no batch, since all ranks sum up together.
    """

    def __init__(self, domains: Iterable[str], end: Callable[[str], None]) -> None:
        self.domains, self.end, self.current = list(domains), end, ""

    def begin(self, domain: str) -> None:
        """End the domains before this one, to which the next batch belongs; "" ends the last."""
        if domain != self.current or not domain:
            for ended in domains_ended(self.current, domain, self.domains):
                self.end(ended)
        self.current = domain


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """`pooled`: statistics weighted over domains. `energy`: sum |y|^2 by domain.

    `held_out_TF`: this rank's reader inputs by domain; `held_out_drift_TH`: if asked, the drift of
    the same tokens. `by_domain`: each domain's own statistics, if the weighting is in `BY_DOMAIN`.
    """

    pooled: Statistics
    energy: dict[str, float]
    held_out_TF: dict[str, Tensor]
    held_out_drift_TH: dict[str, Tensor]
    by_domain: dict[str, Statistics]


def damped_gram(gram: Gram, damping: float) -> Float[Tensor, "F F"]:
    """Return H = G + diag(ridge), see `ridge_of`, as a new float64 matrix on `float64_device`."""
    hessian = gram.full()
    hessian.diagonal().add_(ridge_of(gram, damping))
    return hessian


def ridge_of(gram: Gram, damping: float) -> Float[Tensor, " F"]:
    """Return damping * G_jj for each channel j, as if all were first scaled to one size, see
    `Gram.part`.

    So a loud channel does not damp the others. A channel that is silent, or nearly, gets a trace of
    the mean, so that the system is solvable. 1 if all are silent and removal costs nothing.
    """
    diagonal_F = gram.diagonal().to(float64_device(gram.device)).to(torch.float64)
    mean = float(diagonal_F.mean())
    return (
        damping * diagonal_F.clamp_min(SILENT * mean) if mean > 0 else torch.ones_like(diagonal_F)
    )


def inverse_of(hessian_FF: Float[Tensor, "F F"]) -> Float[Tensor, "F F"]:
    """Return the inverse of a positive definite matrix, overwriting it to save memory.

    Raises NumericsError if it is not: few tokens and little damping leave rounding below zero.
    """
    factor_FF = cholesky_of(
        hessian_FF,
        "obs: a damped Gram matrix has no inverse; raise repair.damping or use more tokens.",
    )
    return torch.cholesky_inverse(factor_FF, out=hessian_FF.mT)


def cholesky_of(matrix_FF: Float[Tensor, "F F"], refusal: str) -> Float[Tensor, "F F"]:
    """Return the lower Cholesky factor of a symmetric matrix, in its memory, column-major.

    Raises NumericsError, which says `refusal`, if the matrix is not positive definite.
    """
    # The transposed view is column-major, as LAPACK needs to work in place.
    failed = torch.zeros((), dtype=torch.int32, device=matrix_FF.device)
    factor_FF, _ = torch.linalg.cholesky_ex(matrix_FF.mT, out=(matrix_FF.mT, failed))
    if failed:
        raise NumericsError(refusal)
    return factor_FF


def removal_errors(
    weight_HF: Float[Tensor, "H F"],
    inverse_FF: Float[Tensor, "F F"],
    columns_UW: Int64[Tensor, "U w"],
) -> Float[Tensor, " U"]:
    """Return tr(W_M ([H^-1]_MM)^-1 W_M') for each unit's columns M.

    One column j: |W_j|^2 / [H^-1]_jj. Source: Hassibi and Stork 1993; block form: Frantar and
    Alistarh, OBC, arXiv 2208.11580, eq. 7.
    """
    if columns_UW.shape[1] == 1:
        # The norm allocates no squared copy of the weights.
        return torch.linalg.vector_norm(weight_HF, dim=0).square() / inverse_FF.diagonal()
    blocks_Uww = inverse_FF[columns_UW[:, :, None], columns_UW[:, None, :]]
    weight_UwH = weight_HF.T[columns_UW].to(inverse_FF.dtype)
    return (weight_UwH * torch.linalg.solve(blocks_Uww, weight_UwH)).sum(dim=(1, 2))


def complement(indices_S: Int64[Tensor, " S"], size: int) -> Int64[Tensor, " C"]:
    """Return the other indices below `size`, sorted."""
    is_other = torch.ones(size, dtype=torch.bool, device=indices_S.device)
    is_other[indices_S] = False
    return is_other.nonzero().flatten()


def keep_highest(scores_F: Float[Tensor, " F"], num_keep: int) -> Int64[Tensor, " K"]:
    """Return the sorted indices of the `num_keep` highest scores; the lower index wins a tie."""
    order = torch.sort(scores_F, descending=True, stable=True).indices
    return order[:num_keep].sort().values
