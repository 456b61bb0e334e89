"""Scores: how important each unit is. Higher score = keep, always. One function per score, one row of `SCORES` each.

In: the reader's weight, its input statistics pooled over domains, which reader columns each unit owns, the squared norm
of its writer rows; for experts, what the router did. Out: one number per unit. Packages add scores: docs/extend.md.

Letters: H reader outputs, F reader columns, U units, w columns of one unit, E experts.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.device import float64_device
from secateur.errors import PluginError
from secateur.gram import Gram, sum_dtype
from secateur.plugins import SCORE_GROUP, look_up
from secateur.stats import Statistics, domain_weight
from secateur.taylor import taylor_scores

Needs = Literal["moments", "gram", "gradients", "routing"]
Units = Literal["channels and heads", "experts", "all"]


@dataclass(frozen=True, slots=True)
class Score:
    """One score: its function, what must be measured for it, and which units it tells apart.

    needs, and what the function then takes and returns:
    moments: `ScoreInputs` with sums and squares of the reader's inputs; one number per unit.
    gram: the same with their Gram matrix.
    gradients: the model, its architecture, groups, batches; numbers per unit by (layer, group name).
    routing: `ExpertInputs`; one number per expert.

    units: a recipe whose groups hold others is refused. `all`: channels and heads, and experts too, which are told
    apart by `energy` (channels within them by OBS) whatever the score; by chance if that is `random`.
    """

    function: Callable[..., Any]
    needs: Needs = "moments"
    units: Units = "channels and heads"

    def __post_init__(self) -> None:
        for name, value, allowed in (("needs", self.needs, Needs), ("units", self.units, Units)):
            if value not in get_args(allowed):
                raise ValueError(f"{name}: must be one of {', '.join(get_args(allowed))}, got {value!r}")
        if (self.needs == "routing") != (self.units == "experts"):
            raise ValueError(f"units: experts have needs: routing and no others do, got {self.units}, {self.needs}")


@dataclass(frozen=True, slots=True)
class ScoreInputs:
    """What the scores of channels and heads may look at. `seed`: for `random` alone, differs by layer and round."""

    reader_HF: Tensor
    writer_squares_U: Tensor
    statistics: Statistics
    columns_UW: Tensor
    damping: float
    seed: int

    @property
    def num_units(self) -> int:
        """How many numbers a score returns."""
        return len(self.columns_UW)

    @property
    def device(self) -> torch.device:
        """Where a score's numbers are to be."""
        return self.reader_HF.device


@dataclass(frozen=True, slots=True)
class Routing:
    """What one domain's tokens did: per expert, how many chose it, and the sums of norms and energies of what it gave.

    Of its output times the router's weight; an energy is a squared norm.
    """

    num_tokens_E: Tensor
    norms_E: Tensor
    energy_E: Tensor

    @classmethod
    def of(cls, num_tokens_E: Tensor, norms_TE: list[Tensor]) -> "Routing":
        """Return the sums of every expert's norms, one per token that chose it."""
        dtype = sum_dtype(num_tokens_E.device)
        norms_E, energy_E = (
            torch.stack([norms_T.to(dtype).pow(power).sum() for norms_T in norms_TE]) for power in (1, 2)
        )
        return cls(num_tokens_E.to(dtype), norms_E, energy_E)

    def plus(self, other: "Routing") -> "Routing":
        """Return the sums over both's tokens."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Routing(*(a + b for a, b in zip(mine, theirs, strict=True)))


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """What the scores of experts may look at: the routing by domain, the domains' shares and how they are pooled."""

    routing: dict[str, Routing]
    shares: dict[str, float]
    weighting: str
    seed: int

    @property
    def num_units(self) -> int:
        """How many numbers a score returns."""
        return len(next(iter(self.routing.values())).norms_E)

    @property
    def device(self) -> torch.device:
        """Where a score's numbers are to be."""
        return next(iter(self.routing.values())).norms_E.device


def random(inputs: ScoreInputs | ExpertInputs) -> Float[Tensor, " U"]:
    """Uniform random numbers: the floor that every other score must beat."""
    generator = torch.Generator().manual_seed(inputs.seed)
    return torch.rand(inputs.num_units, generator=generator).to(inputs.device)


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


def energy(inputs: ExpertInputs) -> Float[Tensor, " E"]:
    """s_j = sum_d q_d energy_dj / sum_i energy_di (`tokens`: energies pooled): an expert's share of the layer's energy.

    It is what least squares would have to make up for, and beats `reap` where half of the experts go: LOG, 2026-11-26.
    """
    parts = [
        domain_weight(inputs.weighting, inputs.shares[d], float(each.energy_E.sum())) * each.energy_E
        for d, each in inputs.routing.items()
    ]
    return torch.stack(parts).sum(dim=0).float()


def frequency(inputs: ExpertInputs) -> Float[Tensor, " E"]:
    """s_j = sum_d q_d n_dj / sum_i n_di, the share of choices that fell on expert j."""
    parts = [inputs.shares[d] * each.num_tokens_E / each.num_tokens_E.sum() for d, each in inputs.routing.items()]
    return torch.stack(parts).sum(dim=0).float()


def reap(inputs: ExpertInputs) -> Float[Tensor, " E"]:
    """s_j = sum_d w_d norms_dj / sum_d w_d n_dj, the mean weighted norm of what expert j gave the tokens that chose it.

    w_d = q_d / sum_i norms_di, so that a loud domain does not decide for the others (`tokens`: w_d = 1); 0 for an
    expert that no token chose. Source: Lasby et al., REAP, arXiv 2510.13999, eq. 9; theirs is over one pool of text.
    """
    first = next(iter(inputs.routing.values()))
    norms_E, num_E = torch.zeros_like(first.norms_E), torch.zeros_like(first.norms_E)
    for domain, each in inputs.routing.items():
        weight = domain_weight(inputs.weighting, inputs.shares[domain], float(each.norms_E.sum()))
        norms_E += weight * each.norms_E
        num_E += weight * each.num_tokens_E
    return torch.where(num_E > 0, norms_E / num_E.clamp(min=1e-300), 0.0).float()


SCORES: dict[str, Score] = {
    "random": Score(random, units="all"),
    "magnitude": Score(magnitude, units="all"),
    "wanda": Score(wanda, units="all"),
    "flap": Score(flap, units="all"),
    "obs": Score(obs, needs="gram", units="all"),
    "taylor": Score(taylor_scores, needs="gradients"),
    "paper": Score(paper, units="all"),
    "reap": Score(reap, needs="routing", units="experts"),
    "frequency": Score(frequency, needs="routing", units="experts"),
}
"""The built-in scores by recipe name; `recipe.SCORE_NAMES` repeats the names."""


def find_score(name: str) -> Score:
    """Return a built-in score, or the one of that name that an installed package registers.

    Raises RecipeError if there is none, PluginError if a package registers one that cannot be used.
    """
    return look_up(SCORE_GROUP, name, SCORES, lambda found: isinstance(found, Score), "a secateur.Score")


def needs_gram(name: str) -> bool:
    """Say whether the score needs the Gram matrix; the others need moments alone."""
    return find_score(name).needs == "gram"


def scored(name: str, inputs: ScoreInputs | ExpertInputs) -> Float[Tensor, " U"]:
    """Return the units' scores of one group. Raises PluginError if they are not one number per unit."""
    score = find_score(name)
    if isinstance(inputs, ExpertInputs) and score.units != "experts":
        scores_U = random(inputs) if name == "random" else energy(inputs)
    else:
        scores_U = score.function(inputs)
    if not isinstance(scores_U, Tensor) or scores_U.shape != (inputs.num_units,):
        got = tuple(scores_U.shape) if isinstance(scores_U, Tensor) else type(scores_U).__name__
        raise PluginError(f"score '{name}': must return a tensor of {inputs.num_units} numbers, one a unit, got {got}.")
    return scores_U


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
