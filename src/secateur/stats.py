"""Statistics of a reader's inputs, per domain, and their pooling over domains.

In: a reader's input x and output y, batch by batch. Out: token mass, sums, output energy and the Gram matrix. All are
sums, so batches, halves and domains merge by adding. What a batch gives is computed in float32 and added up in float64,
where the order of batches does not show; see `gram`.

Letters: T tokens, F reader inputs (units x rows per unit), H reader outputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.gram import PRODUCT_ROWS, Gram, exact_product_precision, pieces, sum_dtype
from secateur.ranks import sum_tensors

# Weightings that look at each domain by itself, and so need its statistics kept.
BY_DOMAIN = frozenset({"minimax"})


@dataclass(slots=True)
class Statistics:
    """Weighted sums over tokens: `mass` = sum w, `sum_F` = sum w x, `energy` = sum w |y|^2, `gram` = sum w x x'.

    `cross_FH` = sum w x r' with r the drift that the reader is to make up for; None where nothing is.
    `gram` is None where a score needs moments alone; then `sum_squares_F` = sum w x^2 stands in for its diagonal.
    """

    mass: float
    sum_F: Tensor
    sum_squares_F: Tensor
    energy: Tensor
    gram: Gram | None
    cross_FH: Tensor | None = None

    @classmethod
    def empty(
        cls,
        num_inputs: int,
        device: torch.device,
        *,
        gram: bool,
        num_drift_outputs: int = 0,
        dtype: torch.dtype | None = None,
    ) -> "Statistics":
        """Return statistics of no tokens. `num_drift_outputs`: the reader's outputs, where a drift will be given.

        `dtype`: of all but the energy: float32 for what only holds sums that are complete; None: `sum_dtype`.
        """
        place: Any = {"device": device, "dtype": dtype or sum_dtype(device)}
        zeros, square = torch.zeros(num_inputs, **place), Gram(num_inputs, **place) if gram else None
        cross_FH = torch.zeros(num_inputs, num_drift_outputs, **place) if num_drift_outputs else None
        energy = torch.zeros((), device=device, dtype=sum_dtype(device))
        return cls(0.0, zeros, zeros.clone(), energy, square, cross_FH)

    def update(
        self, x_TF: Float[Tensor, "T F"], y_TH: Float[Tensor, "T H"], drift_TH: Float[Tensor, "T H"] | None = None
    ) -> None:
        """Add one batch of reader inputs and outputs (the output without its bias), and the drift if there is one."""
        self.mass += len(x_TF)
        self.sum_F += x_TF.sum(dim=0, dtype=torch.float32)
        self.energy += torch.linalg.vector_norm(y_TH, dtype=torch.float32).square()
        if self.gram is None:
            self.sum_squares_F += x_TF.float().square().sum(dim=0)
        else:
            self.gram.add_product(x_TF)
            self.sum_squares_F.copy_(self.gram.diagonal())
        if self.cross_FH is not None:
            assert drift_TH is not None
            with exact_product_precision(x_TF.dtype):
                for x_PF, drift_PH in zip(pieces(x_TF), pieces(drift_TH), strict=True):
                    rows = zip(self.cross_FH.split(PRODUCT_ROWS), x_PF.split(PRODUCT_ROWS, dim=1), strict=True)
                    for cross_RH, x_PR in rows:
                        cross_RH += x_PR.float().T @ drift_PH.float()

    def merge(self, other: "Statistics", weight: float = 1.0) -> None:
        """Add `weight` times another set of tokens; weight 1 gives what one pass over both would have given."""
        self.mass += weight * other.mass
        self.sum_F.add_(other.sum_F, alpha=weight)
        self.sum_squares_F.add_(other.sum_squares_F, alpha=weight)
        self.energy.add_(other.energy, alpha=weight)
        if self.gram is not None and other.gram is not None:
            self.gram.merge(other.gram, weight)
        if self.cross_FH is not None and other.cross_FH is not None:
            self.cross_FH.add_(other.cross_FH, alpha=weight)

    def sum_over_ranks(self) -> None:
        """Become the sums over all ranks' tokens. Of the Gram matrix only the triangle that is stored travels."""
        mass = torch.tensor([self.mass], dtype=torch.float64)
        tensors = [self.sum_F, self.sum_squares_F, self.energy]
        tensors += [] if self.gram is None else self.gram.blocks
        tensors += [] if self.cross_FH is None else [self.cross_FH]
        sum_tensors([mass, *tensors])
        self.mass = float(mass)

    def clear(self) -> None:
        """Forget every token, keeping the memory."""
        self.mass = 0.0
        for tensor in (self.sum_F, self.sum_squares_F, self.energy):
            tensor.zero_()
        if self.gram is not None:
            self.gram.clear()
        if self.cross_FH is not None:
            self.cross_FH.zero_()

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


def domain_weight(weighting: str, share: float, statistics: Statistics) -> float:
    """Return the factor of one domain's sums in the pooled ones.

    `tokens`: 1, raw pooling. `energy`: share_d / e_d with e_d the domain's output energy sum |y|^2, so that a loud
    domain does not decide everything; equal shares give every domain the same say. A silent domain (e_d = 0) gets 0.
    `minimax` begins as `energy` does; see `domain_weights`.
    """
    if weighting == "tokens":
        return 1.0
    energy = float(statistics.energy)
    return share / energy if energy > 0 else 0.0


def pool(by_domain: dict[str, Statistics], weights: dict[str, float]) -> Statistics:
    """Return sum_d q_d S_d / e_d as new statistics, with q the weights and e_d the domain's output energy."""
    first = next(iter(by_domain.values()))
    num_drift_outputs = 0 if first.cross_FH is None else first.cross_FH.shape[1]
    pooled = Statistics.empty(
        len(first.sum_F),
        first.sum_F.device,
        gram=first.gram is not None,
        num_drift_outputs=num_drift_outputs,
        dtype=torch.float32,
    )
    for name, statistics in by_domain.items():
        pooled.merge(statistics, domain_weight("energy", weights[name], statistics))
    return pooled
