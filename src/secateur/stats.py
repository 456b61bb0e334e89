"""Statistics of a reader's inputs, per domain, and their pooling over domains.

In: a reader's input x and output y, batch by batch. Out: token mass, sums, output energy and the Gram matrix. All are
sums, so batches, halves and domains merge by adding. Accumulated in float32.

Letters: T tokens, F reader inputs (units x rows per unit), H reader outputs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.gram import Gram

# Weightings that look at each domain by itself, and so need its statistics kept.
BY_DOMAIN = frozenset({"minimax", "cvar"})


@dataclass(slots=True)
class Statistics:
    """Weighted sums over tokens: `mass` = sum w, `sum_F` = sum w x, `energy` = sum w |y|^2, `gram` = sum w x x'.

    `gram` is None where a score needs moments alone; then `sum_squares_F` = sum w x^2 stands in for its diagonal.
    """

    mass: float
    sum_F: Tensor
    sum_squares_F: Tensor
    energy: Tensor
    gram: Gram | None

    @classmethod
    def empty(cls, num_inputs: int, device: torch.device, *, gram: bool) -> "Statistics":
        """Return statistics of no tokens."""
        zeros = torch.zeros(num_inputs, device=device)
        square = Gram(num_inputs, device) if gram else None
        return cls(0.0, zeros, zeros.clone(), torch.zeros((), device=device), square)

    def update(self, x_TF: Float[Tensor, "T F"], y_TH: Float[Tensor, "T H"]) -> None:
        """Add one batch of reader inputs and outputs (the output without its bias)."""
        self.mass += len(x_TF)
        self.sum_F += x_TF.sum(dim=0, dtype=torch.float32)
        self.energy += torch.linalg.vector_norm(y_TH, dtype=torch.float32).square()
        if self.gram is None:
            self.sum_squares_F += x_TF.float().square().sum(dim=0)
        else:
            self.gram.add_product(x_TF)
            self.sum_squares_F.copy_(self.gram.diagonal())

    def merge(self, other: "Statistics", weight: float = 1.0) -> None:
        """Add `weight` times another set of tokens; weight 1 gives what one pass over both would have given."""
        self.mass += weight * other.mass
        self.sum_F.add_(other.sum_F, alpha=weight)
        self.sum_squares_F.add_(other.sum_squares_F, alpha=weight)
        self.energy.add_(other.energy, alpha=weight)
        if self.gram is not None and other.gram is not None:
            self.gram.merge(other.gram, weight)

    def clear(self) -> None:
        """Forget every token, keeping the memory."""
        self.mass = 0.0
        for tensor in (self.sum_F, self.sum_squares_F, self.energy):
            tensor.zero_()
        if self.gram is not None:
            self.gram.clear()

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
    `minimax` and `cvar` begin as `energy` does; see `domain_weights`.
    """
    if weighting == "tokens":
        return 1.0
    energy = float(statistics.energy)
    return share / energy if energy > 0 else 0.0


def pool(by_domain: dict[str, Statistics], weights: dict[str, float]) -> Statistics:
    """Return sum_d q_d S_d / e_d as new statistics, with q the weights and e_d the domain's output energy."""
    first = next(iter(by_domain.values()))
    pooled = Statistics.empty(len(first.sum_F), first.sum_F.device, gram=first.gram is not None)
    for name, statistics in by_domain.items():
        pooled.merge(statistics, domain_weight("energy", weights[name], statistics))
    return pooled
