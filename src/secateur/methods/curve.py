"""The curve budget: widths per layer from measured error curves and KL slopes, by a knapsack."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from secateur.errors import RecipeError
from secateur.facts import PerDomain
from secateur.methods.budget import Plan, Prices, out_of_reach, plan_of
from secateur.model.group import Counts, GroupKey, Groups

MAX_STEPS = 50_000


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


# Updates of the weights of limited domains; halvings between these weights and the given ones.
WEIGHT_UPDATES, HALVINGS = 20, 10


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
