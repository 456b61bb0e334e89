"""Statistics of a reader's inputs, per domain, and their pooling over domains.

In: a reader's input x and output y, batch by batch. Out: token mass, sums, output energy and the Gram matrix. All are
sums, so batches, halves and domains merge by adding. What a batch gives is computed in float32 and added up in float64,
where the order of batches does not show; see `gram`.

Ranks meet here: what is summed over their tokens is summed by a function below. What must be the same on all of them
is computed by a `Decide` that the caller gives.

Letters: T tokens, F reader inputs (units x rows per unit), H reader outputs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.gram import PRODUCT_ROWS, Gram, exact_product_precision, pieces, sum_dtype
from secateur.ranks import domains_ended, gathered, sum_by_name, sum_tensors

T = TypeVar("T")
Key = TypeVar("Key")

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
        """Become the sums over all ranks' tokens."""
        mass = torch.tensor([self.mass], dtype=torch.float64)
        parts = (part for part in (self.gram, self.cross_FH) if part is not None)
        sum_over_ranks(mass, self.sum_F, self.sum_squares_F, self.energy, *parts)
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


def domain_weight(weighting: str, share: float, energy: float) -> float:
    """Return the factor of one domain's sums in the pooled ones.

    `tokens`: 1, raw pooling. `energy`: share_d / e_d with e_d the domain's output energy sum |y|^2, so that a loud
    domain does not decide everything; equal shares give every domain the same say. A silent domain (e_d = 0) gets 0.
    `minimax` begins as `energy` does; see `domain_weights`.
    """
    if weighting == "tokens":
        return 1.0
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
        pooled.merge(statistics, domain_weight("energy", weights[name], float(statistics.energy)))
    return pooled


@runtime_checkable
class Decide(Protocol):
    """Returns on every rank what one of them has computed; `here`, in one process, what is computed."""

    def __call__(self, compute: Callable[[], T], /) -> T:
        """Return what `compute` returns."""
        ...


def here(compute: Callable[[], T], /) -> T:
    """Return what `compute` returns: the `Decide` of one process."""
    return compute()


def sum_over_ranks(*parts: Tensor | Gram) -> None:
    """Make every part the sum over all ranks, in place. Of a Gram matrix only the triangle that is stored travels."""
    sum_tensors([tensor for part in parts for tensor in (part.blocks if isinstance(part, Gram) else [part])])


def totals(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sums over all ranks of numbers or small tensors by name; a rank may lack some of the names."""
    return sum_by_name(values)


def of_all_ranks(parts: Mapping[Key, T]) -> dict[Key, T]:
    """Return the entries of all ranks."""
    return {key: value for part in gathered(dict(parts)) for key, value in part.items()}


class InOrder:
    """Calls `fold` for a domain once its batches are over; on every rank for the same domains in the same order.

    A rank folds domains too that have no batch on it, since all ranks sum up together.
    """

    def __init__(self, domains: Iterable[str], fold: Callable[[str], None]) -> None:
        self.domains, self.fold, self.current = list(domains), fold, ""

    def begin(self, domain: str) -> None:
        """Say which domain the next batch is of."""
        if domain != self.current:
            self._until(domain)

    def end(self) -> None:
        """Say that no batch follows."""
        self._until("")

    def _until(self, begun: str) -> None:
        for domain in domains_ended(self.current, begun, self.domains):
            self.fold(domain)
        self.current = begun
