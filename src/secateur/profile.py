"""The profile: what each group loses at each width, and how much each loss matters. Nothing is cut.

In: a model as it is now, calibration batches. Out: per group its error curve and its KL slopes, see `GroupProfile`; if
asked, the refitted reader of every level in a database. Levels are multiples of the group's step.

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

from secateur.arch import Arch, Group, linear, num_units_left
from secateur.budget import GroupKey, levels_of
from secateur.budget_curve import GroupProfile
from secateur.compensate import least_squares
from secateur.cut import rows_of, unit_columns
from secateur.gram import Gram
from secateur.level_database import LevelDatabase
from secateur.measure import measure
from secateur.memory import release_freed
from secateur.obs import greedy_obs, units_at_once
from secateur.probe import Probe
from secateur.progress import Progress, silent
from secateur.ranks import from_first
from secateur.score import damped_gram
from secateur.stats import Statistics
from secateur.walk import Batch, Walk


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """`perturbation`: the share of a group's units that goes to measure its slope. `probe_blocks`: per domain.

    `to_zero`: 0 units are a level too. The others as in the recipe; `shares` of the domains.
    """

    weighting: str
    shares: dict[str, float]
    damping: float
    obs_batch: int | None
    align: int
    perturbation: float
    probe_blocks: int
    max_levels: int
    to_zero: bool = False


@torch.no_grad()
def profile(
    model: nn.Module,
    arch: Arch,
    groups: tuple[Group, ...],
    batches: list[Batch],
    settings: ProfileSettings,
    *,
    database: LevelDatabase | None = None,
    progress: Progress = silent,
) -> dict[GroupKey, GroupProfile]:
    """Return every group's profile, and fill the database if there is one.

    The error at a level is the squared error of the reader's output after greedy OBS with refit, as a share of its
    output energy, both pooled over domains. The slope of a domain is KL(model || model with this one group refitted at
    the level nearest to `perturbation`) over the error there; 0 for a group that has one level or loses nothing. A
    group that is gone already has the one level 0.

    Costs one pass of all batches, each layer run once for every group of it, and per group one OBS down to the lowest
    level and the probe's blocks through the layers from its own on: half a pass of them on average, and the head; as
    much again with `to_zero`. A database adds a least-squares solve per level.
    Raises NumericsError as `measure` and `Probe.kl` do.
    """
    measured = [batch for batch in batches if not batch.held_out]
    walk, probe = Walk(model, arch, measured), Probe(model, arch, measured, settings.probe_blocks)
    profiles: dict[GroupKey, GroupProfile] = {}
    progress("profile", 0, len(groups))
    for index in range(arch.num_layers):
        mine = [g for g in groups if g.layer == index and num_units_left(walk.layers[index], g)]
        for group in mine:
            is_last = group is mine[-1]
            statistics = measure(walk, group, settings.weighting, settings.shares, gram=True, to_end=is_last).pooled
            reader = linear(walk.layers[index], group.reader.module)
            profiles[index, group.name] = _profile_group(group, reader, statistics, probe, settings, database)
            release_freed()
            progress("profile", len(profiles), len(groups))
        for group in (group for group in groups if group.layer == index and group not in mine):
            profiles[index, group.name] = GroupProfile((0,), (0.0,), dict.fromkeys(settings.shares, 0.0))
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

    def at(self, num_keep: int) -> tuple[Int64[Tensor, " R"], Float[Tensor, "H R"]]:
        """Return the columns that stay and their weights as they would be stored."""
        num_units = self.reader.in_features // self.group.width
        stays = torch.ones(num_units, dtype=torch.bool, device=self.reader.weight.device)
        stays[self.removed_U[: num_units - num_keep]] = False
        columns = rows_of(stays.nonzero().flatten(), self.group.reader.segments, num_units)
        if not len(columns):
            return columns, self.reader.weight[:, columns]
        weight_HF, dtype = self.reader.weight.float(), self.reader.weight.dtype
        fit = from_first(partial(least_squares, weight_HF, self.gram, columns, self.damping))
        return columns, fit.weight_HS.to(dtype)


def _profile_group(
    group: Group,
    reader: nn.Linear,
    statistics: Statistics,
    probe: Probe,
    settings: ProfileSettings,
    database: LevelDatabase | None,
) -> GroupProfile:
    assert statistics.gram is not None
    num_units, align, most = reader.in_features // group.width, settings.align, settings.max_levels
    levels = levels_of(group, num_units, align, most)
    removed_U, errors = from_first(lambda: _error_curve(group, reader, statistics, levels, settings))
    refit = _Refit(group, reader, statistics.gram, removed_U, settings.damping)
    all_levels = levels_of(group, num_units, align, most, to_zero=settings.to_zero)
    if database is not None:
        for level in all_levels:
            database.add((group.layer, group.name), level, *refit.at(level), reader.bias)
    slopes = dict.fromkeys(settings.shares, 0.0)
    wanted = (1 - settings.perturbation) * levels[0]
    perturbed = min(range(1, len(levels)), key=lambda index: abs(levels[index] - wanted), default=0)
    if errors[perturbed] > 0:
        with _columns_replaced(reader, *refit.at(levels[perturbed])):
            slopes = {name: nats / errors[perturbed] for name, nats in probe.kl().items()}
    if not settings.to_zero:
        return GroupProfile(levels, errors, slopes)
    with _columns_replaced(reader, *refit.at(0)):
        return GroupProfile(all_levels, (*errors, 1.0), slopes, probe.kl())


def _error_curve(
    group: Group, reader: nn.Linear, statistics: Statistics, levels: tuple[int, ...], settings: ProfileSettings
) -> tuple[Int64[Tensor, " U"], tuple[float, ...]]:
    """Return the units in order of removal, and the error at each level as a share of the output energy.

    The units of the lowest level are in no order, after the others.
    """
    assert statistics.gram is not None
    num_removed = [levels[0] - level for level in levels]
    # Every level must fall on the end of a batch.
    batch = math.gcd(units_at_once(settings.obs_batch, reader.in_features, group.width), *num_removed)
    columns_UW = unit_columns(group.reader.segments, levels[0], reader.weight.device)
    hessian = damped_gram(statistics.gram, settings.damping)
    found = greedy_obs(reader.weight, hessian, columns_UW, levels[-1], batch)
    curve, energy = [0.0, *found.error_curve.tolist()], float(statistics.energy)
    removed_U = found.removed
    if settings.to_zero:
        is_left = torch.ones(levels[0], dtype=torch.bool, device=removed_U.device)
        is_left[removed_U] = False
        removed_U = torch.cat([removed_U, is_left.nonzero().flatten()])
    return removed_U, tuple(curve[count // batch] / energy if energy > 0 else 0.0 for count in num_removed)


@contextmanager
def _columns_replaced(
    reader: nn.Linear, columns_R: Int64[Tensor, " R"], weight_HR: Float[Tensor, "H R"]
) -> Iterator[None]:
    """Within the context the reader has these weights in these columns and zeros elsewhere, then its own again.

    Without any column it gives nothing, its bias included: the whole group is gone.
    """
    own, own_bias = reader.weight, reader.bias
    changed = torch.zeros_like(own)
    changed[:, columns_R] = weight_HR
    reader.weight = nn.Parameter(changed, requires_grad=False)
    if not len(columns_R):
        reader.register_parameter("bias", None)
    try:
        yield
    finally:
        reader.weight, reader.bias = own, own_bias
