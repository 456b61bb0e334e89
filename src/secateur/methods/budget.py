"""Budgets: how many units each group keeps. No weight is read here.

`uniform_plan` goes by shapes alone. `curve_plan` goes by measured error curves and KL slopes of the
groups (`GroupProfile`), by a knapsack.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray
from torch import nn

from secateur.errors import RecipeError
from secateur.facts import PerDomain
from secateur.model.bind import Arch
from secateur.model.group import ALIGNED, Counts, Group, GroupKey, Groups, by_name

# Widths that suit tensor cores: ALIGN_LARGE from LARGE_WIDTH units on. llama.cpp's k-quants store
# rows in blocks of ALIGN_BLOCKS, and others in wider types; so many blocks are to be left to choose
# from.
ALIGN_SMALL, ALIGN_LARGE, LARGE_WIDTH = 64, 128, 4096
ALIGN_BLOCKS, LEAST_BLOCKS = 256, 8
# An error curve needs no more points than this; wide groups take larger steps.
MAX_LEVELS = 64
# The knapsack counts a removal in at most so many steps.
MAX_STEPS = 50_000
# Updates of the weights of limited domains; halvings between these weights and the given ones.
WEIGHT_UPDATES, HALVINGS = 20, 10


@dataclass(frozen=True, slots=True)
class Prices:
    """What a removal is counted in: parameters of the whole dense model, tied ones once, and of
    each layer.

    `tokens`: those of the tokens that go; they are in the total. `what`: in messages, what has gone
    before.
    """

    per_layer: tuple[int, ...]
    total: int
    tokens: int = 0
    what: str = ""

    @property
    def total_text(self) -> str:
        """The total for people, as `134,515,008 parameters`."""
        return f"{self.total:,} parameters{self.what}"

    def to_remove(self, share: float) -> int:
        """Return the least cost c with c / total >= `share`; the rounded product may be one too
        many.
        """
        cost = math.ceil(share * self.total)
        return cost - 1 if (cost - 1) / self.total >= share else cost

    def taken(self, layers: Collection[int]) -> int:
        """Return the parameters of the tokens that go and of all layers but these."""
        return self.tokens + sum(
            price for index, price in enumerate(self.per_layer) if index not in layers
        )

    def with_only(self, layers: Collection[int]) -> "Prices":
        """Return what is counted of the model that these layers and the tokens left make."""
        taken = self.taken(layers)
        what = " and ".join(["layers"] * (taken > self.tokens) + ["tokens"] * bool(self.tokens))
        what = f" that the {what} left" if what else self.what
        return dataclasses.replace(self, total=self.total - taken, tokens=0, what=what)


def token_prices(model: Any, num_tokens: int) -> int:
    """Return the parameters of tokens: their rows of embedding and head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = 0 if head.weight is embedding.weight else head.in_features
    return num_tokens * (embedding.embedding_dim + own + (head.bias is not None))


def prices_of(arch: Arch, model: nn.Module) -> Prices:
    """Return the parameters of each layer and of the whole model."""
    return Prices(arch.params_per_layer, sum(parameter.numel() for parameter in model.parameters()))


def params_of(groups: Iterable[Group]) -> int:
    """Return the parameters of all units of the groups."""
    return sum(group.num_units * group.params_per_unit for group in groups)


def params_gone(groups: Groups, num_keep: Counts) -> int:
    """Return the parameters that go if each group keeps that many of its full width."""
    return sum(
        (g.num_units - min(num_keep[g.key], g.num_units)) * g.params_per_unit for g in groups
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How many units each group keeps, and the model's cost before and after."""

    num_keep: Counts
    cost_before: int
    cost_after: int

    @property
    def removed_share(self) -> float:
        """The share of the dense model's cost that goes."""
        return 1 - self.cost_after / self.cost_before


def default_align(groups: Groups, keep_share: float) -> int:
    """Return the alignment of widths for a recipe that names none. `keep_share`: of the units that
    stay.
    """
    narrow = [group.num_units for group in groups if group.kind in ALIGNED]
    whole = all(width % ALIGN_BLOCKS == 0 for width in narrow)
    narrowest = min(narrow, default=0)
    if whole and narrowest * keep_share >= LEAST_BLOCKS * ALIGN_BLOCKS:
        return ALIGN_BLOCKS
    return ALIGN_LARGE if narrowest >= LARGE_WIDTH else ALIGN_SMALL


def align_of(group: Group, align: int) -> int:
    """Return the step of a group's counts: `align` for channels, 1 for heads and experts."""
    return align if group.kind in ALIGNED else 1


def least_step(groups: Groups, align: int, *, alike: bool) -> int:
    """Return the cost of the smallest step: one group's, or `alike` that of all of its kind."""
    kinds = by_name(groups).values()
    steps = ([align_of(group, align) * group.params_per_unit for group in kind] for kind in kinds)
    return min(map(sum if alike else min, steps))


def uniform_plan(groups: Groups, prices: Prices, remove: float, align: int) -> Plan:
    """Keep the same share of every group, so that `remove` of the whole model's cost goes.

    The share taken is remove * total / sum(units * price), rounded to the nearest step. Groups with
    large steps (heads) come first and those with small steps make up for their rounding, so the
    target is met within half a step of the last kind per group, or as near as that kind can come.
    Raises RecipeError with the largest possible `remove` for more than that, or with the smallest
    if not even one step would go.
    """
    steps = {group.name: align_of(group, align) * group.params_per_unit for group in groups}
    names = sorted(steps, key=lambda name: (-steps[name], name))
    num_keep = Counts()
    missing = remove * prices.total
    for position, name in enumerate(names):
        left = [group for group in groups if group.name in names[position:]]
        keep_share = 1 - missing / params_of(left)
        members = tuple(group for group in left if group.name == name)
        is_last = position == len(names) - 1
        for group in members:
            step, width = align_of(group, align), group.num_units * keep_share
            num_keep[group.layer, name] = (
                0 if is_last and width < step / 2 else nearest_count(group, width, step)
            )
        missing -= params_gone(members, num_keep)
    least = least_keep(groups, align)
    # The last kind alone may not hold what the others' rounding leaves to it.
    kept = {key: max(count, least[key]) for key, count in num_keep.items()}
    if kept != num_keep and remove > (largest := params_gone(groups, least) / prices.total):
        raise out_of_reach(remove, prices, largest)
    plan = plan_of(groups, prices, kept)
    if plan.cost_after == prices.total:
        last = tuple(by_name(groups)[names[-1]])
        step = align_of(last[0], align)
        below = {group.key: max(counts_below(group, step), default=0) for group in last}
        smallest = math.ceil(1e4 * params_gone(last, below) / prices.total / 2) / 1e4
        raise RecipeError(
            f"remove: {remove:g} of all {prices.total_text} is less than half of the least step of "
            f"{names[-1]}, so nothing would go; ask for at least {smallest:.4f}, lower "
            "align for channels, or name a group of smaller units."
        )
    return plan


def out_of_reach(remove: float, prices: Prices, largest: float) -> RecipeError:
    """Return the error for more than the groups hold. `largest`: the most that can go, as a
    share.
    """
    return RecipeError(
        f"remove: {remove:g} of all {prices.total_text} is out of reach; the recipe's groups allow "
        f"at most {round_down(largest)} with each at its smallest width; ask for less, lower "
        "align, name more groups, or remove more whole layers (depth)."
    )


def plan_of(groups: Groups, prices: Prices, num_keep: Counts) -> Plan:
    """Return the plan that keeps these counts."""
    return Plan(num_keep, prices.total, prices.total - params_gone(groups, num_keep))


def least_keep(groups: Groups, align: int) -> Counts:
    """Return each group's lowest count: one step, or as many as its config can state."""
    least = Counts()
    for group in groups:
        step = align_of(group, align)
        least[group.key] = next(counts_below(group, step), group.num_units)
    return least


def counts_below(group: Group, step: int) -> Iterator[int]:
    """Yield the multiples of the step that the group's config can state, below its full width."""
    return filter(group.allows, range(step, group.num_units, step))


def levels_of(group: Group, num_units: int, align: int) -> tuple[int, ...]:
    """Return all units, then the counts below that the group may keep: at most `MAX_LEVELS`
    multiples of its step.

    Those that its config cannot state are left out.
    """
    step = align_of(group, align)
    stride = step * math.ceil(num_units / (step * MAX_LEVELS))
    highest = stride * ((num_units - 1) // stride)
    return (num_units, *filter(group.allows, range(highest, 0, -stride)))


def round_shares(rounds: int) -> list[float]:
    """Return the share of the removal that is gone after each round: r/n."""
    # Not `done / rounds`: its last bit differs, and saved plans are compared exactly.
    return [1 - (1 - done / rounds) for done in range(1, rounds + 1)]


def round_plans(
    groups: Groups, prices: Prices, plan: Plan, shares: list[float], align: int
) -> list[Plan]:
    """Return the plan of each round: `shares` of the way to `plan`, each width aligned."""
    plans = []
    for share in shares[:-1]:
        num_keep = {}
        for group in groups:
            target, step = plan.num_keep[group.key], align_of(group, align)
            width = group.num_units - (group.num_units - target) * share
            num_keep[group.key] = max(nearest_count(group, width, step), target)
        plans.append(plan_of(groups, prices, num_keep))
    return [*plans, plan]


def nearest_count(group: Group, width: float | int, step: int) -> int:
    """Return the count nearest to `width` that the config can state, or the full width."""
    nearest = min(step * round(width / step), group.num_units)
    if nearest >= step and group.allows(nearest):
        return nearest
    counts = *counts_below(group, step), group.num_units
    return min(counts, key=lambda count: abs(count - width))


def round_down(fraction: float) -> str:
    """Return a share to three decimals, rounded down: an error may promise it."""
    return f"{int(max(fraction, 0) * 1000) / 1000:.3f}"


def least_loss(removals: list[list[int]], losses: list[list[float]], target: int) -> list[int]:
    """Return each group's option with the least total loss whose removals sum to `target` or more.

    With L_g(n) the least loss by which the first g groups remove n steps or more, L_g(n) = min over
    the options of group g of L_{g-1}(max(n - steps, 0)) + loss. `target` must be at most the sum of
    each group's largest removal. O(groups x options x steps).
    """
    largest = sum(max(options) for options in removals)
    assert target <= largest
    step = max(
        math.gcd(*(removal for options in removals for removal in options)),
        -(-largest // MAX_STEPS),
        1,
    )
    steps = [numpy.array(options)[:, None] // step for options in removals]
    wanted = numpy.arange(min(-(-target // step), sum(int(options.max()) for options in steps)) + 1)
    least = numpy.where(wanted > 0, math.inf, 0.0)
    choices = list[NDArray[numpy.int64]]()
    for options, option_losses in zip(steps, losses, strict=True):
        totals = least[numpy.maximum(wanted - options, 0)] + numpy.array(option_losses)[:, None]
        choices.append(totals.argmin(axis=0))
        least = totals.min(axis=0)

    # Read the choices back from the last group on.
    chosen, left = list[int](), int(wanted[-1])
    for choice, options in zip(reversed(choices), reversed(steps), strict=True):
        chosen.append(int(choice[left]))
        left = max(left - int(options[chosen[-1], 0]), 0)
    return chosen[::-1]


@dataclass(frozen=True, slots=True)
class GroupProfile:
    """What a group loses at each level, a number of units kept, from all of them down.

    `errors`: shares of output energy. `slopes`: by domain, KL in nats per token for an error of 1.
    """

    levels: tuple[int, ...]
    errors: tuple[float, ...]
    slopes: PerDomain


Profiles = Mapping[GroupKey, GroupProfile]


def predicted_rise(profiles: Profiles, num_keep: Counts) -> PerDomain:
    """Return, by domain, sum over groups of slope x error, in nats per token."""
    rise = PerDomain()
    for key, profile in profiles.items():
        error = profile.errors[profile.levels.index(num_keep[key])]
        for domain, slope in profile.slopes.items():
            rise[domain] = rise.get(domain, 0.0) + slope * error
    return rise


def curve_plan(
    groups: Groups, profiles: Profiles, prices: Prices, remove: float, max_rise: PerDomain
) -> Plan:
    """Return the plan with the least predicted rise, averaged over domains.

    At least `remove` of the whole model's cost goes, counted from the groups' full widths, and less
    than one level more if every level costs something. `max_rise`: the highest predicted rise of
    some domains, in nats per token; if the best plan breaks a limit, limited domains weigh more,
    but no more than needed. Raises RecipeError if the groups, with the largest possible `remove`,
    or `max_rise` do not allow it.
    """
    own = {group.key: profiles[group.key] for group in groups}
    removals = [
        [(group.num_units - level) * group.params_per_unit for level in own[group.key].levels]
        for group in groups
    ]
    largest = sum(max(options) for options in removals) / prices.total
    if remove > largest:
        raise out_of_reach(remove, prices, largest)
    num_keep = _Problem(own, removals, prices.to_remove(remove), max_rise).within_limits()
    if num_keep is None:
        names = ", ".join(f"{domain} {limit:g}" for domain, limit in sorted(max_rise.items()))
        raise RecipeError(
            f"remove: {remove:g} of all {prices.total_text} would raise a protected domain's loss "
            f"by more than allowed ({names} nats per token); ask for less or allow more."
        )
    return plan_of(groups, prices, num_keep)


@dataclass(frozen=True, slots=True)
class _Problem:
    """The profiles, the cost removed at each level, group by group, and what is to be removed
    within which limits.
    """

    profiles: Profiles
    removals: list[list[int]]
    target: int
    limits: PerDomain

    def solve(self, weights: PerDomain) -> Counts:
        """Return the counts that remove the target with the least rise, weighted by domain."""
        losses = []
        for profile in self.profiles.values():
            slope = sum(weights.get(domain, 0.0) * rise for domain, rise in profile.slopes.items())
            losses.append([slope * error for error in profile.errors])
        pairs = zip(
            self.profiles.items(), least_loss(self.removals, losses, self.target), strict=True
        )
        return {key: profile.levels[option] for (key, profile), option in pairs}

    def within_limits(self) -> Counts | None:
        """Return the counts of least mean rise found within the limits; None if there are none."""
        domains = sorted(
            {domain for profile in self.profiles.values() for domain in profile.slopes}
        )
        mean = 1 / len(domains)
        best = self.solve(dict.fromkeys(domains, mean))
        if self._allows(best):
            return best
        careful = self._careful_weights()
        if careful is None:
            return None
        # Find the least share of the careful weights that keeps the limits.
        low, high, best = 0.0, 1.0, self.solve(careful)
        for _ in range(HALVINGS):
            share = (low + high) / 2
            mixed = {
                domain: (1 - share) * mean + share * careful.get(domain, 0.0) for domain in domains
            }
            num_keep = self.solve(mixed)
            if self._allows(num_keep):
                high, best = share, num_keep
            else:
                low = share
        return best

    def _careful_weights(self) -> PerDomain | None:
        """Return weights over the limited domains that keep the limits; None if none was found."""
        # For several domains: exponentiated gradient to the domain furthest over its limit.
        raised = dict.fromkeys(self.limits, 0.0)
        for _ in range(WEIGHT_UPDATES if len(self.limits) > 1 else 1):
            weights = {
                domain: math.exp(raised[domain]) / limit for domain, limit in self.limits.items()
            }
            total = sum(weights.values())
            weights = {domain: weight / total for domain, weight in weights.items()}
            num_keep = self.solve(weights)
            if self._allows(num_keep):
                return weights
            rise = predicted_rise(self.profiles, num_keep)
            furthest = max(rise[domain] / limit for domain, limit in self.limits.items())
            raised = {
                domain: raised[domain] + rise[domain] / limit / furthest
                for domain, limit in self.limits.items()
            }
        return None

    def _allows(self, num_keep: Counts) -> bool:
        rise = predicted_rise(self.profiles, num_keep)
        return all(rise[domain] <= limit for domain, limit in self.limits.items())
