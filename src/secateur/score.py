"""Scores: how important each unit is. Higher score = keep, always.

In: the reader's weight, its input statistics pooled over domains, which reader columns each unit owns, the squared norm
of its writer rows. Out: one number per unit. One function per score.

Letters: H reader outputs, F reader columns, U units, w columns of one unit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.device import float64_device
from secateur.gram import Gram
from secateur.stats import Statistics


@dataclass(frozen=True, slots=True)
class ScoreInputs:
    """What the scores may look at. `seed` feeds `random` alone and differs by layer and round."""

    reader_HF: Tensor
    writer_squares_U: Tensor
    statistics: Statistics
    columns_UW: Tensor
    damping: float
    seed: int


def random(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """Uniform random numbers: the floor that every other score must beat."""
    generator = torch.Generator().manual_seed(inputs.seed)
    return torch.rand(len(inputs.columns_UW), generator=generator).to(inputs.reader_HF.device)


def magnitude(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """Norm of all weights of the unit, reader columns and writer rows: s_j = sqrt(|W_j|^2 + sum_writers |V_j|^2).

    No data. Source: the L2 group norm of Ma et al., LLM-Pruner, arXiv 2305.11627, section 3.2.
    """
    return (_summed(inputs.reader_HF.square().sum(dim=0), inputs) + inputs.writer_squares_U).sqrt()


def wanda(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """s_j = sum over the unit's columns of sum_h |W_hj| * rms(x_j), with rms over the pooled tokens.

    Source: Sun et al., arXiv 2306.11695, eq. 1, summed over a channel (Wanda-sp of An et al., arXiv 2312.11983).
    """
    return _summed(inputs.reader_HF.abs().sum(dim=0) * inputs.statistics.mean_square_F.sqrt(), inputs)


def flap(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """s_j = sum over the unit's columns of var(x_j) * |W_j|^2: what a bias cannot repair when unit j goes (WIFV).

    Source: An et al., FLAP, arXiv 2312.11983, eq. 5.
    """
    return _summed(inputs.statistics.variance_F * inputs.reader_HF.square().sum(dim=0), inputs)


def paper(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """s_j = sqrt(sum over the unit's columns of mean(x_j^2) * |W_j|^2): the size of what unit j adds to the output.

    Our reconstruction of the activation-weighted channel score of arXiv 2601.02674, whose formula is not public to us.
    """
    per_column_F = inputs.statistics.mean_square_F * inputs.reader_HF.square().sum(dim=0)
    return _summed(per_column_F, inputs).sqrt()


def obs(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """Output error left when unit j goes and the others are refitted, see `removal_errors`.

    H is the damped Gram matrix, see `damped_gram`. Exact for one removal. Source: Hassibi and Stork, 1993, eq. 5.
    """
    assert inputs.statistics.gram is not None
    inverse = inverse_of(damped_gram(inputs.statistics.gram, inputs.damping))
    scores_U = removal_errors(inputs.reader_HF.to(inverse.device), inverse, inputs.columns_UW.to(inverse.device))
    return scores_U.float().to(inputs.reader_HF.device)


def removal_errors(
    weight_HF: Float[Tensor, "H F"], inverse_FF: Float[Tensor, "F F"], columns_UW: Int64[Tensor, "U w"]
) -> Float[Tensor, " U"]:
    """Return tr(W_M ([H^-1]_MM)^-1 W_M') for the columns M of each unit; for one column |W_j|^2 / [H^-1]_jj.

    Source: Hassibi and Stork 1993; the block form as in Frantar and Alistarh, OBC, arXiv 2208.11580, eq. 7.
    """
    if columns_UW.shape[1] == 1:
        # The norm needs no squared copy of the weights.
        return torch.linalg.vector_norm(weight_HF, dim=0).square() / inverse_FF.diagonal()
    blocks_Uww = inverse_FF[columns_UW[:, :, None], columns_UW[:, None, :]]
    weight_UwH = weight_HF.T[columns_UW].to(inverse_FF.dtype)
    return (weight_UwH * torch.linalg.solve(blocks_Uww, weight_UwH)).sum(dim=(1, 2))


def _summed(values_F: Float[Tensor, " F"], inputs: ScoreInputs) -> Float[Tensor, " U"]:
    return values_F[inputs.columns_UW].sum(dim=1)


SCORES: dict[str, Callable[[ScoreInputs], Tensor]] = {
    "random": random,
    "magnitude": magnitude,
    "wanda": wanda,
    "flap": flap,
    "obs": obs,
    "paper": paper,
}
"""Scores that look at one group at a time, by recipe name; `taylor`, which needs the whole model, is beside them."""

NEED_GRAM = frozenset({"obs"})
"""Scores that need the Gram matrix; the others need moments alone."""


def keep_highest(scores_F: Float[Tensor, " F"], num_keep: int) -> Int64[Tensor, " K"]:
    """Return the sorted indices of the `num_keep` highest scores; of equal scores the lower index stays."""
    order = torch.sort(scores_F, descending=True, stable=True).indices
    return order[:num_keep].sort().values


def damped_gram(gram: Gram, damping: float) -> Float[Tensor, "F F"]:
    """Return H = G + damping * mean(diag G) * I as a new float64 matrix, on `float64_device`."""
    hessian = gram.full(torch.float64, float64_device(gram.device))
    hessian.diagonal().add_(ridge_of(gram, damping))
    return hessian


def ridge_of(gram: Gram, damping: float) -> float:
    """Return damping * mean(diag G), or 1 where every input is zero: any ridge then says that nothing is lost."""
    ridge = damping * float(gram.diagonal().mean())
    return ridge if ridge > 0 else 1.0


def inverse_of(hessian_FF: Float[Tensor, "F F"]) -> Float[Tensor, "F F"]:
    """Return the inverse of a positive definite matrix, overwriting it to save memory."""
    # The transposed view is column-major, as LAPACK wants it, so that both steps work in place without a copy.
    factor = torch.linalg.cholesky(hessian_FF.mT, out=hessian_FF.mT)
    return torch.cholesky_inverse(factor, out=hessian_FF.mT)
