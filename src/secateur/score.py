"""Scores: how important each unit is. Higher score = keep, always.

In: the reader's weight, its input statistics pooled over domains, the squared norm of each unit's writer rows.
Out: one number per unit. One function per score; units one reader column wide (wider ones need block formulae).

Letters: H reader outputs, F units.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.gram import Gram
from secateur.stats import Statistics


@dataclass(frozen=True, slots=True)
class ScoreInputs:
    """What the scores may look at. `seed` feeds `random` alone and differs by layer and round."""

    reader_HF: Tensor
    writer_squares_F: Tensor
    statistics: Statistics
    damping: float
    seed: int


def random(inputs: ScoreInputs) -> Float[Tensor, " F"]:
    """Uniform random numbers: the floor that every other score must beat."""
    generator = torch.Generator().manual_seed(inputs.seed)
    return torch.rand(inputs.reader_HF.shape[1], generator=generator).to(inputs.reader_HF.device)


def magnitude(inputs: ScoreInputs) -> Float[Tensor, " F"]:
    """Norm of all weights of the unit, reader column and writer rows: s_j = sqrt(|W_j|^2 + sum_writers |V_j|^2).

    No data. Source: the L2 group norm of Ma et al., LLM-Pruner, arXiv 2305.11627, section 3.2.
    """
    return (inputs.reader_HF.square().sum(dim=0) + inputs.writer_squares_F).sqrt()


def wanda(inputs: ScoreInputs) -> Float[Tensor, " F"]:
    """s_j = sum_h |W_hj| * rms(x_j), with rms over the pooled tokens.

    Source: Sun et al., arXiv 2306.11695, eq. 1, summed over a channel (Wanda-sp of An et al., arXiv 2312.11983).
    """
    return inputs.reader_HF.abs().sum(dim=0) * inputs.statistics.mean_square_F.sqrt()


def flap(inputs: ScoreInputs) -> Float[Tensor, " F"]:
    """s_j = var(x_j) * |W_j|^2: what a bias cannot repair when channel j goes (WIFV).

    Source: An et al., FLAP, arXiv 2312.11983, eq. 5.
    """
    return inputs.statistics.variance_F * inputs.reader_HF.square().sum(dim=0)


def obs(inputs: ScoreInputs) -> Float[Tensor, " F"]:
    """s_j = |W_j|^2 / [H^-1]_jj: the output error left when channel j goes and the others are refitted.

    H is the damped Gram matrix, see `damped_gram`. Exact for one removal. Source: Hassibi and Stork, 1993, eq. 5.
    """
    assert inputs.statistics.gram is not None
    inverse = inverse_of(damped_gram(inputs.statistics.gram, inputs.damping))
    return (inputs.reader_HF.double().square().sum(dim=0) / inverse.diagonal()).float()


SCORES: dict[str, Callable[[ScoreInputs], Tensor]] = {
    "random": random,
    "magnitude": magnitude,
    "wanda": wanda,
    "flap": flap,
    "obs": obs,
}
"""Every score by its recipe name."""

NEED_GRAM = frozenset({"obs"})
"""Scores that need the Gram matrix; the others need moments alone."""


def keep_highest(scores_F: Float[Tensor, " F"], num_keep: int) -> Int64[Tensor, " K"]:
    """Return the sorted indices of the `num_keep` highest scores; of equal scores the lower index stays."""
    order = torch.sort(scores_F, descending=True, stable=True).indices
    return order[:num_keep].sort().values


def damped_gram(gram: Gram, damping: float) -> Float[Tensor, "F F"]:
    """Return H = G + damping * mean(diag G) * I as a new float64 matrix (float32 where the device has no float64)."""
    hessian = gram.full(solve_dtype(gram.device))
    hessian.diagonal().add_(ridge_of(gram, damping))
    return hessian


def ridge_of(gram: Gram, damping: float) -> float:
    """Return damping * mean(diag G), or 1 where every input is zero: any ridge then says that nothing is lost."""
    ridge = damping * float(gram.diagonal().mean())
    return ridge if ridge > 0 else 1.0


def solve_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def inverse_of(hessian_FF: Float[Tensor, "F F"]) -> Float[Tensor, "F F"]:
    """Return the inverse of a positive definite matrix, overwriting it to save memory."""
    # The transposed view is column-major, as LAPACK wants it, so that both steps work in place without a copy.
    factor = torch.linalg.cholesky(hessian_FF.mT, out=hessian_FF.mT)
    return torch.cholesky_inverse(factor, out=hessian_FF.mT)
