"""The search budget: try level switches between groups and keep those that move the predictions less.

In: a plan to start from, the level database. Out: a plan that removes at least as much and lies no further from the
unpruned model on a few blocks. Source: Sieberling et al., EvoPress, arXiv 2410.14649; here all offspring are judged
on the same blocks, so that the best found is never worse than the start.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from secateur.arch import Arch, Group, decoder_layers, linear
from secateur.budget import GroupKey, Plan, Prices
from secateur.level_database import LevelDatabase
from secateur.probe import Probe
from secateur.progress import Progress, silent
from secateur.walk import Batch

MAX_SWITCHES = 3

Levels = dict[GroupKey, int]


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """`probe_blocks`: per domain. Every offspring costs one pass of them."""

    seed: int
    generations: int
    offspring: int
    probe_blocks: int


def search_plan(
    model: nn.Module,
    arch: Arch,
    groups: tuple[Group, ...],
    prices: Prices,
    database: LevelDatabase,
    start: Plan,
    batches: list[Batch],
    settings: SearchSettings,
    *,
    min_keep: Mapping[GroupKey, int] | None = None,
    max_rise: Mapping[str, float] | None = None,
    progress: Progress = silent,
) -> Plan:
    """Return the best plan found, or `start` itself if none is better.

    Fitness: mean over domains of KL(model || model with every group's reader from the database). Each generation makes
    `offspring` of the best plan, each by one to three switches: one group a level narrower, others wider as long as the
    plan costs no more than `start`. No group goes below `min_keep`. A domain in `max_rise` may not rise above its
    limit, or above the start's rise where that is higher. The model is as before afterwards.

    `start` must keep a level of the database in every group. Raises NumericsError if a divergence is not finite.
    """
    readers = {(g.layer, g.name): linear(decoder_layers(model, arch)[g.layer], g.reader.module) for g in groups}
    price = {(group.layer, group.name): prices.of(group) for group in groups}
    assert all(start.num_keep[key] in database.levels[key] for key in price), "start is not on the database's levels"
    judge = _Judge(readers, database, Probe(model, arch, batches, settings.probe_blocks))
    levels = {key: [n for n in database.levels[key] if n >= (min_keep or {}).get(key, 0)] for key in price}
    choose, total = random.Random(settings.seed), settings.generations * settings.offspring
    progress("search", 0, total)
    try:
        best = first = {key: start.num_keep[key] for key in price}
        rise = judge.rise(first)
        limits = {domain: max(limit, rise[domain]) for domain, limit in (max_rise or {}).items()}
        least = _mean(rise)
        for generation in range(settings.generations):
            parent = best
            for number in range(settings.offspring):
                child = _switched(parent, first, levels, price, choose)
                rise = judge.rise(child)
                if _mean(rise) < least and all(rise[domain] <= limit for domain, limit in limits.items()):
                    best, least = child, _mean(rise)
                progress("search", generation * settings.offspring + number + 1, total)
    finally:
        judge.put_back()
    if best == first:
        return start
    return Plan(start.num_keep | best, start.cost_before, start.cost_after + _growth(first, best, price))


class _Judge:
    """Evaluates plans: exchanges only the readers in which a plan differs from the one before, once per plan."""

    def __init__(self, readers: dict[GroupKey, nn.Linear], database: LevelDatabase, probe: Probe) -> None:
        self.readers, self.database, self.probe = readers, database, probe
        self.loaded = {key: database.levels[key][0] for key in readers}
        self.seen: dict[tuple[int, ...], dict[str, float]] = {}

    def rise(self, plan: Levels) -> dict[str, float]:
        """Return KL by domain."""
        fingerprint = tuple(plan.values())
        if fingerprint not in self.seen:
            self._load(plan)
            self.seen[fingerprint] = self.probe.kl()
        return self.seen[fingerprint]

    def put_back(self) -> None:
        self._load({key: self.database.levels[key][0] for key in self.readers})

    def _load(self, plan: Levels) -> None:
        for key, level in plan.items():
            if self.loaded[key] != level:
                self.database.load_into(self.readers[key], key, level)
                self.loaded[key] = level


def _switched(
    plan: Levels, first: Levels, levels: dict[GroupKey, list[int]], price: dict[GroupKey, int], choose: random.Random
) -> Levels:
    """Return a plan a few switches away that costs no more than `first`."""
    plan = dict(plan)
    for _ in range(min(choose.randint(1, MAX_SWITCHES), choose.randint(1, MAX_SWITCHES))):
        narrower = {key: _next(levels[key], plan[key], 1) for key in plan}
        candidates = [key for key, level in narrower.items() if level < plan[key]]
        if not candidates:
            break
        narrowed = choose.choice(candidates)
        plan[narrowed] = narrower[narrowed]
        while wider := _affordable(plan, first, levels, price, narrowed):
            key = choose.choice(wider)
            plan[key] = _next(levels[key], plan[key], -1)
    return plan


def _affordable(
    plan: Levels, first: Levels, levels: dict[GroupKey, list[int]], price: dict[GroupKey, int], narrowed: GroupKey
) -> list[GroupKey]:
    """Return the groups that can go one level wider without costing more than `first`."""
    spare = -_growth(first, plan, price)
    growth = {key: (_next(levels[key], plan[key], -1) - plan[key]) * price[key] for key in plan if key != narrowed}
    return [key for key, added in growth.items() if 0 < added <= spare]


def _next(levels: list[int], level: int, steps: int) -> int:
    return levels[min(max(levels.index(level) + steps, 0), len(levels) - 1)]


def _growth(before: Levels, after: Levels, price: dict[GroupKey, int]) -> int:
    return sum((after[key] - before[key]) * price[key] for key in before)


def _mean(rise: dict[str, float]) -> float:
    return sum(rise.values()) / len(rise)
