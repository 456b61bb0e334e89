"""Scores: how important each unit is, from statistics or gradients. The highest scores stay."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.errors import NumericsError, PluginError
from secateur.facts import Arguments, Batch
from secateur.model.bind import Arch, decoder_layers, head_of
from secateur.model.group import Group, Segments, linear
from secateur.plugins import SCORE_GROUP, look_up
from secateur.stream.statistics import (
    Statistics,
    damped_gram,
    domain_weight,
    inverse_of,
    removal_errors,
    sum_dtype,
    sum_over_ranks,
    totals,
)
from secateur.stream.walk import at_hand

# Positions per slice of logits: with 150k words, logits and gradient take 77 MB in float32.
HEAD_POSITIONS = 64

# Each layer's arguments besides the hidden states, by the shape of a batch.
_Calls = dict[tuple[int, ...], list[Arguments]]


@dataclass(slots=True)
class _Pass:
    """One batch: each layer's inputs, and the gradient on its way down through the layers."""

    inputs_BTD: list[Tensor]
    calls: list[Arguments]
    gradient_BTD: Tensor


def taylor_scores(
    model: nn.Module, arch: Arch, groups: tuple[Group, ...], batches: list[Batch]
) -> dict[tuple[int, str], Tensor]:
    """Return s_j = sum over all weights w of unit j of |w * dL/dw|, by (layer, group name).

    L is the mean next-token cross-entropy over all calibration tokens; held-out batches are
    skipped. A unit's weights are its rows of every writer, biases included, and its columns of the
    reader. Gradients are summed in float32 and divided by the number of tokens last, against
    underflow. Raises NumericsError with the domain if a loss, or with layer and module if a
    gradient is not finite. Source: Ma et al., LLM-Pruner, arXiv 2305.11627, section 3.2, without
    the second-order term, summed over the group, as `param_first` in their code.
    """
    layers, calls = decoder_layers(model, arch), _Calls()
    batches = [batch for batch in batches if not batch.held_out]
    num_tokens = totals({"tokens": sum(batch.ids_BT[:, 1:].numel() for batch in batches)})["tokens"]
    scores: dict[tuple[int, str], Tensor] = {}
    with _frozen(model), torch.enable_grad():
        passes = [_forward(model, arch, batch, calls) for batch in batches]
        for index in reversed(range(min(group.layer for group in groups), arch.num_layers)):
            mine = [group for group in groups if group.layer == index]
            with at_hand(layers[index]) as layer:
                gradients = _backward(layer, index, mine, passes)
                for group in mine:
                    scores[index, group.name] = _unit_sums(layer, group, gradients) / num_tokens
    return scores


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient within the context. Restore the flags afterwards."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


def _forward(model: nn.Module, arch: Arch, batch: Batch, calls: _Calls) -> _Pass:
    """Run the backbone; return the gradient at the last layer's output, where the graph begins."""
    entered, noted, left = list[Tensor](), list[Arguments](), list[Tensor]()

    def note(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        entered.append(inputs[0])
        noted.append((inputs[1:], keywords))

    def begin_graph(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        left.append((output[0] if isinstance(output, tuple) else output).detach().requires_grad_())
        return arch.layer_output(left[0])

    layers = decoder_layers(model, arch)
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        hooks.enter_context(layers[-1].register_forward_hook(begin_graph))
        final_BTD = model.get_submodule(arch.backbone)(batch.ids_BT, use_cache=False).last_hidden_state
    (gradient_BTD,) = torch.autograd.grad(final_BTD, left[0], _final_gradient(head_of(model, arch), final_BTD, batch))
    # Arguments are kept once per shape and layer: in some families masks differ per layer.
    return _Pass(entered, calls.setdefault(tuple(batch.ids_BT.shape), noted), gradient_BTD)


def _final_gradient(head: nn.Module, final_BTD: Float[Tensor, "B T D"], batch: Batch) -> Float[Tensor, "B T D"]:
    """Return the gradient of the summed cross-entropy at the head's input, slice by slice."""
    gradient_BTD, loss = torch.zeros_like(final_BTD), 0.0
    for final_TD, ids_T, gradient_TD in zip(final_BTD.detach(), batch.ids_BT, gradient_BTD, strict=True):
        slices = (part.split(HEAD_POSITIONS) for part in (final_TD[:-1], ids_T[1:], gradient_TD[:-1]))
        for piece, targets, into in zip(*slices, strict=True):
            piece = piece.detach().requires_grad_()
            nats = nn.functional.cross_entropy(head(piece).float(), targets, reduction="sum")
            into.copy_(*torch.autograd.grad(nats, piece))
            loss += float(nats.detach())
    if not torch.isfinite(torch.tensor(loss)):
        raise NumericsError(
            f"taylor score, domain {batch.domain}: the loss is {loss}; "
            f"use the model in bfloat16 or float32 and check its weights."
        )
    return gradient_BTD


def _backward(layer: nn.Module, index: int, groups: list[Group], passes: list[_Pass]) -> dict[str, Tensor]:
    """Move all gradients down through the layer; return the groups' summed weight gradients."""
    parameters = _unit_parameters(layer, groups)
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for each in passes:
        input_BTD = each.inputs_BTD.pop().detach().requires_grad_()
        args, kwargs = each.calls[index]
        output = layer(input_BTD, *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        inputs = [input_BTD, *parameters.values()]
        each.gradient_BTD, *found = torch.autograd.grad(output, inputs, each.gradient_BTD)
        for total, gradient in zip(sums.values(), found, strict=True):
            total += gradient
    sum_over_ranks(*sums.values())
    for name, parameter in parameters.items():
        parameter.requires_grad_(False)
        if not torch.isfinite(sums[name]).all():
            raise NumericsError(
                f"layer {index}, {name.rpartition('.')[0]}: the gradient holds NaN or infinite numbers; "
                f"use the model in bfloat16 or float32 and check its weights."
            )
    return sums


def _unit_parameters(layer: nn.Module, groups: list[Group]) -> dict[str, nn.Parameter]:
    """Return the writers' parameters and the readers' weights. A reader's bias has no unit."""
    names = [f"{axis.module}.{kind}" for group in groups for axis in group.writers for kind in ("weight", "bias")]
    names += [f"{group.reader.module}.weight" for group in groups]
    known = dict(layer.named_parameters())
    return {name: known[name] for name in names if name in known}


@torch.no_grad()
def _unit_sums(layer: nn.Module, group: Group, gradients: dict[str, Tensor]) -> Float[Tensor, " F"]:
    """Return sum |w * gradient| over each unit's weights."""
    reader = linear(layer, group.reader.module)
    num_units = reader.in_features // sum(group.reader.segments)
    columns_R = (reader.weight * gradients[f"{group.reader.module}.weight"]).abs().sum(dim=0)
    total_F = _per_unit(columns_R, group.reader.segments, num_units)
    for axis in group.writers:
        writer = linear(layer, axis.module)
        rows_R = (writer.weight * gradients[f"{axis.module}.weight"]).abs().sum(dim=1)
        if writer.bias is not None:
            rows_R += (writer.bias * gradients[f"{axis.module}.bias"]).abs()
        total_F += _per_unit(rows_R, axis.segments, num_units)
    return total_F


def _per_unit(values_R: Float[Tensor, " R"], segments: Segments, num_units: int) -> Float[Tensor, " F"]:
    """Sum the values of each unit's rows, segment by segment; see `rows_of`."""
    parts = values_R.split([width * num_units for width in segments])
    return torch.stack([part.view(num_units, -1).sum(dim=1) for part in parts]).sum(dim=0)


Needs = Literal["moments", "gram", "gradients", "routing"]
Units = Literal["channels and heads", "experts", "all"]


@dataclass(frozen=True, slots=True)
class Score:
    """A score: its function, what it needs to be measured, and the units it can rank.

    needs: `moments`, `gram`: the function takes `ScoreInputs` and returns one number per unit;
    `gradients`: it takes model, architecture, groups and batches, and returns numbers per unit by
    (layer, group name); `routing`: it takes `ExpertInputs` and returns one number per expert.

    units: other units are refused. `all` also covers experts, which are ranked by `energy` (the
    channels inside them by OBS), or at random if the score is `random`.
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

    @classmethod
    def of(cls, num_tokens_E: Tensor, norms_TE: list[Tensor]) -> "Routing":
        """Return the sums over every expert's norms, given one norm per token that chose it."""
        dtype = sum_dtype(num_tokens_E.device)
        sums = (torch.stack([norms_T.to(dtype).pow(power).sum() for norms_T in norms_TE]) for power in (1, 2))
        return cls(num_tokens_E.to(dtype), *sums)

    def plus(self, other: "Routing") -> "Routing":
        """Return the sums over the tokens of both."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Routing(*(a + b for a, b in zip(mine, theirs, strict=True)))


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
    return _summed(inputs.reader_HF.abs().sum(dim=0) * inputs.statistics.mean_square_F.sqrt(), inputs)


def flap(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """s_j = sum over the unit's columns of var(x_j) * |W_j|^2: the loss that a bias cannot repair.

    Source: An et al., FLAP, arXiv 2312.11983, eq. 5 (WIFV).
    """
    return _summed(inputs.statistics.variance_F * inputs.reader_HF.square().sum(dim=0), inputs)


def paper(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """s_j = sqrt(sum over the unit's columns of mean(x_j^2) * |W_j|^2), the size of its output.

    Our reconstruction of the channel score of arXiv 2601.02674, whose formula we could not read.
    """
    return _summed(inputs.statistics.mean_square_F * inputs.reader_HF.square().sum(dim=0), inputs).sqrt()


def obs(inputs: ScoreInputs) -> Float[Tensor, " U"]:
    """The output error if unit j goes and the others are refitted; see `removal_errors`.

    On the damped Gram matrix. Exact for one removal. Source: Hassibi and Stork, 1993, eq. 5.
    """
    assert inputs.statistics.gram is not None
    inverse = inverse_of(damped_gram(inputs.statistics.gram, inputs.damping))
    scores_U = removal_errors(inputs.reader_HF.to(inverse.device), inverse, inputs.columns_UW.to(inverse.device))
    return scores_U.float().to(inputs.device)


def _summed(values_F: Float[Tensor, " F"], inputs: ScoreInputs) -> Float[Tensor, " U"]:
    return values_F[inputs.columns_UW].sum(dim=1)


def energy(inputs: ExpertInputs) -> Float[Tensor, " E"]:
    """s_j = sum_d q_d energy_dj / sum_i energy_di, an expert's share of the layer's output energy.

    `tokens`: the energies are pooled. Better than `reap` if half of the experts go (LOG).
    """
    energies = [(inputs.shares[d], each.energy_E) for d, each in inputs.routing.items()]
    parts = [domain_weight(inputs.weighting, share, float(each_E.sum())) * each_E for share, each_E in energies]
    return torch.stack(parts).sum(dim=0).float()


def frequency(inputs: ExpertInputs) -> Float[Tensor, " E"]:
    """s_j = sum_d q_d n_dj / sum_i n_di, the share of choices that fell on expert j."""
    parts = [inputs.shares[d] * each.num_tokens_E / each.num_tokens_E.sum() for d, each in inputs.routing.items()]
    return torch.stack(parts).sum(dim=0).float()


def reap(inputs: ExpertInputs) -> Float[Tensor, " E"]:
    """s_j = sum_d w_d norms_dj / sum_d w_d n_dj, its mean norm over the tokens that chose it.

    w_d = q_d / sum_i norms_di, so that loud domains do not dominate (`tokens`: w_d = 1). An expert
    without tokens gets 0. Source: Lasby et al., REAP, arXiv 2510.13999, eq. 9, there for one
    domain.
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
"""The built-in scores by recipe name. `recipe.SCORE_NAMES` repeats the names."""


def find_score(name: str) -> Score:
    """Return a score. Raises RecipeError if there is none, PluginError if it is unusable."""
    return look_up(SCORE_GROUP, name, SCORES, lambda found: isinstance(found, Score), "a secateur.Score")


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
        raise PluginError(f"score '{name}': must return a tensor of {inputs.num_units} numbers, one a unit, got {got}.")
    return scores_U
