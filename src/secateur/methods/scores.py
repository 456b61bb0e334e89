"""Scores: how important each unit is, from statistics. The highest scores stay."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.errors import PluginError
from secateur.plugins import SCORE_GROUP, look_up
from secateur.stream.statistics import (
    Statistics,
    damped_gram,
    domain_weight,
    inverse_of,
    removal_errors,
)

Needs = Literal["moments", "gram", "routing"]
Units = Literal["channels and heads", "experts", "all"]


@dataclass(frozen=True, slots=True)
class Score:
    """A score: its function, what it needs to be measured, and the units it can rank.

    needs: `moments`, `gram`: the function takes `ScoreInputs` and returns one number per unit;
    `routing`: it takes `ExpertInputs` and returns one number per expert.

    units: other units are refused. `all` also covers experts, which are ranked by `energy` (the
    channels inside them by OBS), or at random if the score is `random`.
    """

    function: Callable[..., Any]
    needs: Needs = "moments"
    units: Units = "channels and heads"

    def __post_init__(self) -> None:
        for name, value, allowed in (("needs", self.needs, Needs), ("units", self.units, Units)):
            if value not in get_args(allowed):
                raise ValueError(
                    f"{name}: must be one of {', '.join(get_args(allowed))}, got {value!r}"
                )
        if (self.needs == "routing") != (self.units == "experts"):
            raise ValueError(
                f"units: experts have needs: routing and no others do, got {self.units}, "
                f"{self.needs}"
            )


@dataclass(frozen=True, slots=True)
class ScoreInputs:
    """What the scores of channels and heads may use. Only `random` uses `seed`."""

    reader_HF: Tensor
    writer_squares_U: Tensor
    statistics: Statistics
    columns_UW: Tensor
    damping: float
    seed: int

    @property
    def num_units(self) -> int:
        """The number of scores to return."""
        return len(self.columns_UW)

    @property
    def device(self) -> torch.device:
        """The device of the scores."""
        return self.reader_HF.device


@dataclass(frozen=True, slots=True)
class Routing:
    """Per expert, for a domain: tokens, sums of weighted output norms and of their squares."""

    num_tokens_E: Tensor
    norms_E: Tensor
    energy_E: Tensor


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """What the scores of experts may use: the routing and the share of each domain."""

    routing: dict[str, Routing]
    shares: dict[str, float]
    weighting: str
    seed: int

    @property
    def num_units(self) -> int:
        """The number of scores to return."""
        return len(next(iter(self.routing.values())).norms_E)

    @property
    def device(self) -> torch.device:
        """The device of the scores."""
        return next(iter(self.routing.values())).norms_E.device


def random(inputs: ScoreInputs | ExpertInputs) -> Float[Tensor, " U"]:
    """Uniform random numbers: the baseline that every other score must beat."""
    generator = torch.Generator().manual_seed(inputs.seed)
    return torch.rand(inputs.num_units, generator=generator).to(inputs.device)


def magnitude(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """s_j = sqrt(|W_j|^2 + sum over writers of |V_j|^2), the norm of all weights of the unit.

    No data. Source: the L2 group norm of Ma et al., LLM-Pruner, arXiv 2305.11627, section 3.2.
    """
    return (_summed(inputs.reader_HF.square().sum(dim=0), inputs) + inputs.writer_squares_U).sqrt()


def wanda(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """s_j = sum over the unit's columns of sum_h |W_hj| * rms(x_j), rms over the pooled tokens.

    Source: Sun et al., arXiv 2306.11695, eq. 1, summed over a channel (Wanda-sp, arXiv 2312.11983).
    """
    return _summed(
        inputs.reader_HF.abs().sum(dim=0) * inputs.statistics.mean_square_F.sqrt(), inputs
    )


def flap(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """s_j = sum over the unit's columns of var(x_j) * |W_j|^2: the loss that a bias cannot repair.

    Source: An et al., FLAP, arXiv 2312.11983, eq. 5 (WIFV).
    """
    return _summed(inputs.statistics.variance_F * inputs.reader_HF.square().sum(dim=0), inputs)


def paper(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """s_j = sqrt(sum over the unit's columns of mean(x_j^2) * |W_j|^2), the size of its output.

    Our reconstruction of the channel score of arXiv 2601.02674, whose formula we could not read.
    """
    return _summed(
        inputs.statistics.mean_square_F * inputs.reader_HF.square().sum(dim=0), inputs
    ).sqrt()


def obs(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """The output error if unit j goes and the others are refitted; see `removal_errors`.

    On the damped Gram matrix. Exact for one removal. Source: Hassibi and Stork, 1993, eq. 5.
    """
    inverse = inverse_of(damped_gram(inputs.statistics.gram, inputs.damping))
    scores_U = removal_errors(
        inputs.reader_HF.to(inverse.device), inverse, inputs.columns_UW.to(inverse.device)
    )
    return scores_U.float().to(inputs.device)


def _summed(values_F: Float[Tensor, " F"], inputs: ScoreInputs) -> Float[Tensor, " U"]:
    return values_F[inputs.columns_UW].sum(dim=1)


def energy(inputs: ExpertInputs) -> Float[Tensor, " E"]:
    """s_j = sum_d q_d energy_dj / sum_i energy_di, an expert's share of the layer's output energy.

    `tokens`: the energies are pooled. Better than `reap` if half of the experts go (LOG).
    """
    energies = [(inputs.shares[d], routing.energy_E) for d, routing in inputs.routing.items()]
    parts = [
        domain_weight(inputs.weighting, share, float(each_E.sum())) * each_E
        for share, each_E in energies
    ]
    return torch.stack(parts).sum(dim=0).float()


def reap(inputs: ExpertInputs) -> Float[Tensor, " E"]:
    """s_j = sum_d w_d norms_dj / sum_d w_d n_dj, its mean norm over the tokens that chose it.

    w_d = q_d / sum_i norms_di, so that loud domains do not dominate (`tokens`: w_d = 1). An expert
    without tokens gets 0. Source: Lasby et al., REAP, arXiv 2510.13999, eq. 9, there for one
    domain.
    """
    first = next(iter(inputs.routing.values()))
    norms_E, num_E = torch.zeros_like(first.norms_E), torch.zeros_like(first.norms_E)
    for domain, routing in inputs.routing.items():
        weight = domain_weight(
            inputs.weighting, inputs.shares[domain], float(routing.norms_E.sum())
        )
        norms_E += weight * routing.norms_E
        num_E += weight * routing.num_tokens_E
    return torch.where(num_E > 0, norms_E / num_E.clamp(min=1e-300), 0.0).float()


SCORES: dict[str, Score] = {
    "random": Score(random, units="all"),
    "magnitude": Score(magnitude, units="all"),
    "wanda": Score(wanda, units="all"),
    "flap": Score(flap, units="all"),
    "obs": Score(obs, needs="gram", units="all"),
    "paper": Score(paper, units="all"),
    "reap": Score(reap, needs="routing", units="experts"),
}
"""The built-in scores by recipe name. `recipe.SCORE_NAMES` repeats the names."""


def find_score(name: str) -> Score:
    """Return a score. Raises RecipeError if there is none, PluginError if it is unusable."""
    return look_up(SCORE_GROUP, name, SCORES, Score)


def needs_gram(name: str) -> bool:
    """Return whether the score needs the Gram matrix."""
    return find_score(name).needs == "gram"


def scored(name: str, inputs: ScoreInputs | ExpertInputs) -> Float[Tensor, " U"]:
    """Return the scores of one group. Raises PluginError if they are not one number per unit."""
    score = find_score(name)
    if isinstance(inputs, ExpertInputs) and score.units != "experts":
        scores_U = random(inputs) if name == "random" else energy(inputs)
    else:
        scores_U = score.function(inputs)
    if not isinstance(scores_U, Tensor) or scores_U.shape != (inputs.num_units,):
        got = tuple(scores_U.shape) if isinstance(scores_U, Tensor) else type(scores_U).__name__
        raise PluginError(
            f"score '{name}': must return a tensor of {inputs.num_units} numbers, one a unit, got "
            f"{got}."
        )
    return scores_U
