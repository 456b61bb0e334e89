"""The profile: what each group loses at each width, and how much each loss matters. Nothing is cut.

In: a model as it is now, calibration batches. Out: per group its error curve and its KL slopes, see `GroupProfile`.
Levels are multiples of the group's step.

Letters: H reader outputs, F reader inputs, R those that stay, U units, w columns of one unit.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.arch import Arch, Group, linear
from secateur.budget import GroupKey, levels_of
from secateur.budget_curve import GroupProfile
from secateur.compensate import least_squares
from secateur.cut import rows_of, unit_columns
from secateur.gram import Gram
from secateur.measure import measure
from secateur.obs import greedy_obs, units_at_once
from secateur.probe import Probe
from secateur.progress import Progress, silent
from secateur.score import damped_gram
from secateur.stats import Decide, Statistics, here
from secateur.walk import Batch, Walk


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """`perturbation`: the share of a group's units that goes to measure its slope. `probe_blocks`: per domain.

    The others as in the recipe; `shares` of the domains.
    """

    weighting: str
    shares: dict[str, float]
    damping: float
    obs_batch: int | None
    align: int
    perturbation: float
    probe_blocks: int


@torch.no_grad()
def profile(
    model: nn.Module,
    arch: Arch,
    groups: tuple[Group, ...],
    batches: list[Batch],
    settings: ProfileSettings,
    *,
    decide: Decide = here,
    progress: Progress = silent,
) -> dict[GroupKey, GroupProfile]:
    """Return every group's profile.

    The error at a level is the squared error of the reader's output after greedy OBS with refit, as a share of its
    output energy, both pooled over domains. The slope of a domain is KL(model || model with this one group refitted at
    the level nearest to `perturbation`) over the error there; 0 for a group that has one level or loses nothing.

    Costs one pass of all batches, each layer run once for every group of it, and per group one OBS down to the lowest
    level and the probe's blocks through the layers from its own on: half a pass of them on average, and the head.
    Raises NumericsError as `measure` and `Probe.kl` do.
    """
    measured = [batch for batch in batches if not batch.held_out]
    walk, probe = Walk(model, arch, measured), Probe(model, arch, measured, settings.probe_blocks)
    profiles: dict[GroupKey, GroupProfile] = {}
    progress("profile", 0, len(groups))
    for index in range(arch.num_layers):
        mine = [group for group in groups if group.layer == index]
        for group in mine:
            is_last = group is mine[-1]
            with walk.layer(index) as layer:
                found = measure(walk, group, settings.weighting, settings.shares, gram=True, to_end=is_last).pooled
                reader = linear(layer, group.reader.module)
                profiles[index, group.name] = _profile_group(group, reader, found, probe, settings, decide)
            progress("profile", len(profiles), len(groups))
        if not mine:
            walk.advance(index)
        probe.advance()
    return profiles


@dataclass(frozen=True, slots=True)
class _Refit:
    """A group's reader, refitted for the units left after any number of removals."""

    group: Group
    reader: nn.Linear
    gram: Gram
    removed_U: Tensor
    damping: float
    decide: Decide

    def at(self, num_keep: int) -> tuple[Int64[Tensor, " R"], Float[Tensor, "H R"]]:
        """Return the columns that stay and their weights as they would be stored."""
        num_units = self.reader.in_features // self.group.width
        stays = torch.ones(num_units, dtype=torch.bool, device=self.reader.weight.device)
        stays[self.removed_U[: num_units - num_keep]] = False
        columns = rows_of(stays.nonzero().flatten(), self.group.reader.segments, num_units)
        weight_HF, dtype = self.reader.weight.float(), self.reader.weight.dtype
        fit = self.decide(partial(least_squares, weight_HF, self.gram, columns, self.damping))
        return columns, fit.weight_HS.to(dtype)


def _profile_group(
    group: Group, reader: nn.Linear, statistics: Statistics, probe: Probe, settings: ProfileSettings, decide: Decide
) -> GroupProfile:
    assert statistics.gram is not None
    levels = levels_of(group, reader.in_features // group.width, settings.align)
    removed_U, errors = decide(lambda: _error_curve(group, reader, statistics, levels, settings))
    refit = _Refit(group, reader, statistics.gram, removed_U, settings.damping, decide)
    slopes = dict.fromkeys(settings.shares, 0.0)
    wanted = (1 - settings.perturbation) * levels[0]
    perturbed = min(range(1, len(levels)), key=lambda index: abs(levels[index] - wanted), default=0)
    if errors[perturbed] > 0:
        with _columns_replaced(reader, *refit.at(levels[perturbed])):
            slopes = {name: nats / errors[perturbed] for name, nats in probe.kl().items()}
    return GroupProfile(levels, errors, slopes)


def _error_curve(
    group: Group, reader: nn.Linear, statistics: Statistics, levels: tuple[int, ...], settings: ProfileSettings
) -> tuple[Int64[Tensor, " U"], tuple[float, ...]]:
    """Return the units in order of removal, and the error at each level as a share of the output energy."""
    assert statistics.gram is not None
    num_removed = [levels[0] - level for level in levels]
    # Every level must fall on the end of a batch.
    batch = math.gcd(units_at_once(settings.obs_batch, reader.in_features, group.width), *num_removed)
    columns_UW = unit_columns(group.reader.segments, levels[0], reader.weight.device)
    hessian = damped_gram(statistics.gram, settings.damping)
    found = greedy_obs(reader.weight, hessian, columns_UW, levels[-1], batch)
    curve, energy = [0.0, *found.error_curve.tolist()], float(statistics.energy)
    return found.removed, tuple(curve[count // batch] / energy if energy > 0 else 0.0 for count in num_removed)


@contextmanager
def _columns_replaced(
    reader: nn.Linear, columns_R: Int64[Tensor, " R"], weight_HR: Float[Tensor, "H R"]
) -> Iterator[None]:
    """Within the context the reader has these weights in these columns and zeros elsewhere, then its own again."""
    own = reader.weight
    changed = torch.zeros_like(own)
    changed[:, columns_R] = weight_HR
    reader.weight = nn.Parameter(changed, requires_grad=False)
    try:
        yield
    finally:
        reader.weight = own
