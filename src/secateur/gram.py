"""A Gram matrix x'x, summed batch by batch and held as its lower block triangle.

In: batches of reader inputs. Out: any part of the symmetric matrix, in any dtype. Half of the numbers are the other
half mirrored, so neither the flops nor the bytes for them are spent. The product of a piece of a batch is made in
float32; pieces are added up in float64, which is exact but for freak cases, a float32 number having half the digits. So
the sum does not depend on the order of pieces, and many ranks get the bits of one.

Letters: T tokens, F reader inputs; R and C are lists of rows and columns among F.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.device import float64_device
from secateur.memory import release_freed

# Block rows up to the diagonal cost (1 + 1/8) / 2 of the whole product.
NUM_BLOCKS = 8
# Tokens multiplied at a time, before their product is added to the sum: a batch of the CPU's, or half of one elsewhere,
# where adding takes longer than multiplying so few.
CPU_PIECE_TOKENS, DEVICE_PIECE_TOKENS = 512, 4096
# Rows of a product made at a time, so that it takes little memory beside the sum.
PRODUCT_ROWS = 1024


class Gram:
    """`blocks[b]` holds rows `starts[b]` to `stops[b]`, and of those the columns before `stops[b]`."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Begin with zeros. `dtype`: float32 for what only holds a sum that is complete; None: `sum_dtype`."""
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
        """Forget everything, keeping the memory."""
        for block in self.blocks:
            block.zero_()

    def diagonal(self) -> Float[Tensor, " F"]:
        """Return sum x_j^2 for each input j."""
        return torch.cat([block.diagonal(start) for start, block in zip(self.starts, self.blocks, strict=True)])

    def part(
        self,
        rows_R: Int64[Tensor, " R"],
        columns_C: Int64[Tensor, " C"],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Float[Tensor, "R C"]:
        """Return a new matrix of these rows and columns (both sorted), mirrored where the other half is stored.

        `device`: where it is to be, by default where the sum is. Memory freed before goes back to the system first.
        """
        release_freed()
        result_RC = torch.empty(len(rows_R), len(columns_C), dtype=dtype, device=device or self.device)
        row_bounds, column_bounds = (self._bounds(index) for index in (rows_R, columns_C))
        for b, (start, block) in enumerate(zip(self.starts, self.blocks, strict=True)):
            (row, row_end), (column, column_end) = row_bounds[b : b + 2], column_bounds[b : b + 2]
            # Rows of this block with columns up to its end; then its strictly left part, read the other way round.
            lower, left = rows_R[row:row_end] - start, columns_C[column:column_end] - start
            result_RC[row:row_end, :column_end] = block[lower][:, columns_C[:column_end]].to(result_RC.device)
            result_RC[:row, column:column_end] = block[left][:, rows_R[:row]].T.to(result_RC.device)
        return result_RC

    def full(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Float[Tensor, "F F"]:
        """Return the whole symmetric matrix as a new one, see `part`."""
        everything = torch.arange(self.size, device=self.device)
        return self.part(everything, everything, dtype, device)

    def _bounds(self, index: Int64[Tensor, " N"]) -> list[int]:
        edges = torch.tensor([*self.starts, self.size], device=index.device)
        return torch.searchsorted(index, edges).tolist()


def pieces(tensor_TX: Float[Tensor, "T X"]) -> tuple[Tensor, ...]:
    """Return the tokens that are multiplied at a time."""
    return tensor_TX.split(CPU_PIECE_TOKENS if tensor_TX.device.type == "cpu" else DEVICE_PIECE_TOKENS)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that sums over batches are made in: float64, or float32 where the device has none."""
    return torch.float64 if float64_device(device) == device else torch.float32


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
