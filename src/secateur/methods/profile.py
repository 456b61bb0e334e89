"""The profile: what each group loses at each width, and how much it matters. Nothing is cut."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.facts import PerDomain
from secateur.log import Progress, silent
from secateur.methods.budget import GroupProfile, levels_of
from secateur.methods.compensate import least_squares, weight_replaced
from secateur.methods.select import greedy_obs, units_at_once
from secateur.model.bind import Arch, head_of
from secateur.model.group import Group, GroupKey, Groups, linear, rows_of, unit_columns
from secateur.stream.losses import KL_POSITIONS, states_for_head, token_divergences
from secateur.stream.measure import measure
from secateur.stream.statistics import Gram, Statistics, complement, damped_gram, decided, totals
from secateur.stream.walk import Batch, Walk

# Of each domain: what a change of the model does to its predictions is measured on these.
PROBE_BLOCKS = 1


class Probe:
    """Each block's hidden state before the current layer, and the dense logits (tokens x words)."""

    def __init__(self, model: nn.Module, arch: Arch, batches: list[Batch]) -> None:
        """Take the first block of each domain, held-out batches excluded."""
        self.model, self.arch, self.position = model, arch, 0
        self._walk = Walk(model, arch, first_blocks(batches, PROBE_BLOCKS))
        self._head = head_of(model, arch)
        with torch.inference_mode():
            # The model's own dtype holds the logits exactly.
            self._logits_PV = [
                torch.cat([self._head(piece_PD) for piece_PD in states_PD.split(KL_POSITIONS)])
                for states_PD in self._states()
            ]

    def advance(self) -> None:
        """Move past one layer, as it is now."""
        self._walk.advance(self.position)
        self.position += 1

    def kl(self) -> PerDomain:
        """Return each domain's divergence. Raises NumericsError if one is not finite."""
        sums: dict[str, Tensor] = {}
        for batch, logits_PV, now_PD in zip(
            self._walk.batches, self._logits_PV, self._states(), strict=True
        ):
            divergence_P = (
                token_divergences(logits_PV, nn.Identity(), now_PD, self._head).cpu().double()
            )
            own = torch.tensor([divergence_P.sum(), len(divergence_P)], dtype=torch.float64)
            sums[batch.domain] = sums.get(batch.domain, 0.0) + own
        means = {domain: float(total / count) for domain, (total, count) in totals(sums).items()}
        for domain, mean in means.items():
            if not math.isfinite(mean):
                raise NumericsError(
                    f"KL of a change from layer {self.position} on, domain {domain}: it is not "
                    "finite; use the model in bfloat16 or float32 and check its weights."
                )
        # Rounding may leave a divergence slightly below zero.
        return {domain: max(mean, 0.0) for domain, mean in means.items()}

    def _states(self) -> list[Tensor]:
        standing = list(self._walk.hidden_BTD)
        for index in range(self.position, self.arch.num_layers):
            self._walk.advance(index)
        states = [
            states_for_head(self.model, self.arch, batch, hidden_BTD)
            for batch, hidden_BTD in zip(self._walk.batches, self._walk.hidden_BTD, strict=True)
        ]
        self._walk.hidden_BTD = standing
        return states


def first_blocks(batches: list[Batch], num_blocks: int, *, after: int = 0) -> list[Batch]:
    """Return `num_blocks` blocks of each domain after the first `after`, held-out batches excluded.

    A rank returns those of its own batches, so that all ranks together have one process's blocks.
    """
    chosen: list[Batch] = []
    for batch in (batch for batch in batches if not batch.held_out):
        start = max(after - batch.first_block, 0)
        stop = min(after + num_blocks - batch.first_block, len(batch.ids_BT))
        if stop > start:
            counted_BT = None if batch.counted_BT is None else batch.counted_BT[start:stop]
            first = batch.first_block + start
            chosen.append(Batch(batch.domain, False, batch.ids_BT[start:stop], first, counted_BT))
    return chosen


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """The recipe's settings. `perturbation`: the share of units removed to measure a slope."""

    weighting: str
    shares: PerDomain
    damping: float
    align: int
    perturbation: float


@torch.no_grad()
def profile(
    model: nn.Module,
    arch: Arch,
    groups: Groups,
    batches: list[Batch],
    settings: ProfileSettings,
    *,
    progress: Progress = silent,
) -> dict[GroupKey, GroupProfile]:
    """Return every group's profile.

    The error at a level is the squared error of the reader's output after greedy OBS with refit, as
    a share of its output energy, both pooled over domains. A domain's slope is KL(model || model
    with this group refitted at the level nearest to `perturbation`) over the error there; 0 for a
    group that has one level or loses nothing.

    Costs one pass of all batches, each layer run once per group of it, and per group one OBS to the
    lowest level and the probe's blocks through the rest of the model: half a pass on average, and
    the head. Raises NumericsError as `measure` and `Probe.kl` do.
    """
    measured = [batch for batch in batches if not batch.held_out]
    walk, probe = Walk(model, arch, measured), Probe(model, arch, measured)
    profiles: dict[GroupKey, GroupProfile] = {}
    progress("profile", 0, len(groups))
    for index in range(arch.num_layers):
        mine = [group for group in groups if group.layer == index]
        for group in mine:
            is_last = group is mine[-1]
            with walk.layer(index) as layer:
                statistics = measure(
                    walk, group, settings.weighting, settings.shares, gram=True, to_end=is_last
                ).pooled
                reader = linear(layer, group.reader.module)
                profiles[index, group.name] = _profile_group(
                    group, reader, statistics, probe, settings
                )
            progress("profile", len(profiles), len(groups))
        if not mine:
            walk.advance(index)
        probe.advance()
    return profiles


def _profile_group(
    group: Group, reader: nn.Linear, statistics: Statistics, probe: Probe, settings: ProfileSettings
) -> GroupProfile:
    levels = levels_of(group, reader.in_features // group.width, settings.align)

    def error_curve() -> tuple[Int64[Tensor, " U"], list[float]]:
        """Return the units in order of removal, and each level's error over the output energy."""
        num_removed = [levels[0] - level for level in levels]
        # Every level must fall on the end of a batch.
        batch = math.gcd(units_at_once(reader.in_features, group.width), *num_removed)
        columns_UW = unit_columns(group.reader.segments, levels[0], reader.weight.device)
        hessian = damped_gram(statistics.gram, settings.damping)
        order = greedy_obs(reader.weight, hessian, columns_UW, levels[-1], batch)
        curve, energy = [0.0, *order.error_curve.tolist()], float(statistics.energy)
        return order.removed, [
            curve[count // batch] / energy if energy > 0 else 0.0 for count in num_removed
        ]

    removed_U, errors = decided(error_curve)
    slopes = dict.fromkeys(settings.shares, 0.0)
    wanted = (1 - settings.perturbation) * levels[0]
    perturbed = min(range(1, len(levels)), key=lambda index: abs(levels[index] - wanted), default=0)
    if errors[perturbed] > 0:
        changed_HF = _refitted(
            group, reader, statistics.gram, removed_U, settings.damping, levels[perturbed]
        )
        with weight_replaced(reader, changed_HF):
            slopes = {name: nats / errors[perturbed] for name, nats in probe.kl().items()}
    return GroupProfile(levels, tuple(errors), slopes)


def _refitted(
    group: Group,
    reader: nn.Linear,
    gram: Gram,
    removed_U: Int64[Tensor, " U"],
    damping: float,
    num_keep: int,
) -> Float[Tensor, "H F"]:
    """Return the weight, as it would be stored, for the units left when only `num_keep` are; other
    columns are zero.
    """
    num_units, weight_HF = reader.in_features // group.width, torch.zeros_like(reader.weight)
    stays = complement(removed_U[: num_units - num_keep], num_units)
    columns = rows_of(stays, group.reader.segments, num_units)
    new_HS = decided(partial(least_squares, reader.weight.float(), gram, columns, damping))
    weight_HF[:, columns] = new_HS.to(weight_HF.dtype)
    return weight_HF
