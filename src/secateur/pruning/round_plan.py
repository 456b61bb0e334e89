"""A round's plan: how many units each group keeps, by the recipe's budget. Nothing is cut here."""

from functools import partial

from secateur.methods.budget import Plan, least_keep, plan_of
from secateur.methods.curve import GroupProfile, Profiles, curve_plan, predicted_rise
from secateur.methods.profile import ProfileSettings, profile
from secateur.model.bind import decoder_layers
from secateur.model.group import GroupKey
from secateur.pruning.run import Run
from secateur.ranks import from_first
from secateur.stream.statistics import BY_DOMAIN
from secateur.stream.walk import Batch


def plan_round(run: Run, number: int, batches: list[Batch], max_rise: dict[str, float]) -> Plan:
    """Return the plan of round `number`.

    `max_rise`: how much each protected domain's loss may still rise. Raises RecipeError if the
    round's share cannot go within these limits.
    """
    if run.kept or run.resolved.recipe.choose.budget == "uniform":
        return run.resolved.plans[number - 1]
    planned = partial(_planned, run, number, batches, max_rise)
    found = run.services.store.value(f"round-{number}-plan", planned, kind=list[tuple[GroupKey, int]])
    return plan_of(run.resolved.groups, run.resolved.prices_left, dict(found))


def _planned(run: Run, number: int, batches: list[Batch], max_rise: dict[str, float]) -> list[tuple[GroupKey, int]]:
    resolved, remove = run.resolved, run.resolved.removals[number - 1]
    least = least_keep(resolved.groups, resolved.align, resolved.recipe.remove.min_keep)
    prices, profiles = resolved.prices_left, run.profiles or profiles_of(run, number, batches)
    plan = from_first(lambda: curve_plan(resolved.groups, profiles, prices, remove, min_keep=least, max_rise=max_rise))
    predicted = predicted_rise(profiles, plan.num_keep)
    run.services.log.write({"event": "plan", "round": number, "budget": "curve", "predicted_rise": predicted})
    return [*plan.num_keep.items()]


def profiles_of(run: Run, number: int, batches: list[Batch]) -> Profiles:
    """Return the profiles of the model as it is now; slopes are those of this round's share."""

    def made() -> list[tuple[GroupKey, GroupProfile]]:
        settings, progress = _profile_settings(run, number), run.services.progress
        return [*profile(run.model, run.arch, run.resolved.groups, batches, settings, progress=progress).items()]

    kind = list[tuple[GroupKey, GroupProfile]]
    return dict(run.services.store.value(f"round-{number}-profiles", made, kind=kind))


def _profile_settings(run: Run, number: int) -> ProfileSettings:
    """Return the settings; slopes are measured at the width of an equal share for all groups."""
    recipe, groups = run.resolved.recipe, run.resolved.groups
    layers = decoder_layers(run.model, run.arch)
    now = sum(g.parts.num_units_left(layers[g.layer]) * g.params_per_unit for g in groups)
    then = sum(run.resolved.plans[number - 1].num_keep[g.key] * g.params_per_unit for g in groups)
    return ProfileSettings(
        # Weights by domain act through the slopes.
        weighting="energy" if recipe.choose.domain_weighting in BY_DOMAIN else recipe.choose.domain_weighting,
        shares=run.shares,
        damping=run.resolved.damping,
        align=run.resolved.align,
        perturbation=1 - then / now,
    )


def layer_seed(seed: int, number: int, layer: int) -> int:
    """Return a different seed for each layer and round."""
    return (seed * 1_000_003 + number) * 1_000_003 + layer
