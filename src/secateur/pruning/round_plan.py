"""A round's plan: how many units each group keeps, by the recipe's budget. Nothing is cut here."""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.facts import Batch
from secateur.methods.budget import Plan, global_plan, least_keep
from secateur.methods.curve import curve_plan, predicted_rise
from secateur.methods.profile import ProfileSettings, profile
from secateur.methods.scores import find_score, needs_gram
from secateur.methods.select import unit_scores
from secateur.model.bind import decoder_layers
from secateur.model.group import GroupKey
from secateur.pruning.run import Run
from secateur.ranks import from_first
from secateur.recipe import Recipe
from secateur.stream.measure import measure
from secateur.stream.statistics import BY_DOMAIN
from secateur.stream.walk import Walk


def plan_round(
    run: Run, number: int, batches: list[Batch], max_rise: dict[str, float], scores: dict[GroupKey, Tensor]
) -> Plan:
    """Return the plan of round `number`, given the `scores` of `whole_model_scores`.

    `max_rise`: how much each protected domain's loss may still rise. Raises RecipeError if the
    round's share cannot go within these limits.
    """
    if run.kept or run.resolved.recipe.choose.budget == "uniform":
        return run.resolved.plans[number - 1]

    def made() -> dict[str, Any]:
        plan = _planned(run, number, batches, max_rise, scores)
        return {**dataclasses.asdict(plan), "num_keep": [[*key, count] for key, count in plan.num_keep.items()]}

    found = run.services.store.value(f"round-{number}-plan", made)
    return Plan(**{**found, "num_keep": {(layer, name): count for layer, name, count in found["num_keep"]}})


def _planned(
    run: Run, number: int, batches: list[Batch], max_rise: dict[str, float], scores: dict[GroupKey, Tensor]
) -> Plan:
    resolved, remove = run.resolved, run.resolved.removals[number - 1]
    recipe, prices = resolved.recipe, resolved.prices_left
    least = least_keep(resolved.groups, resolved.align, recipe.remove.min_keep)
    if recipe.choose.budget == "global":
        scores = scores or _scores(run, number, batches)
        align, found = resolved.align, scores
        return from_first(lambda: global_plan(resolved.groups, found, prices, remove, align, min_keep=least))
    settings, progress = _profile_settings(run, number), run.services.progress
    profiles = profile(run.model, run.arch, resolved.groups, batches, settings, decide=from_first, progress=progress)
    plan = from_first(lambda: curve_plan(resolved.groups, profiles, prices, remove, min_keep=least, max_rise=max_rise))
    predicted = predicted_rise(profiles, plan.num_keep)
    run.services.log.write({"event": "plan", "round": number, "budget": "curve", "predicted_rise": predicted})
    return plan


def whole_model_scores(run: Run, number: int, batches: list[Batch]) -> dict[GroupKey, Tensor]:
    """Return scores that need gradients of the whole model; none if the score needs none."""
    score = find_score(run.resolved.recipe.choose.score)
    if run.kept or score.needs != "gradients":
        return {}
    name, groups = f"round-{number}-scores", {f"{group.layer} {group.name}": group for group in run.resolved.groups}
    found = run.services.store.find(name)
    if found is not None:
        device = next(run.model.parameters()).device
        return {(groups[key].layer, groups[key].name): scores_U.to(device) for key, scores_U in found[0].items()}
    run.services.progress("score", 0, 1)
    scores = score.function(run.model, run.arch, run.resolved.groups, batches)
    run.services.store.save(name, {f"{layer} {group}": scores_U for (layer, group), scores_U in scores.items()}, {})
    run.services.progress("score", 1, 1)
    return scores


def _profile_settings(run: Run, number: int) -> ProfileSettings:
    """Return the settings; slopes are measured at the width of an equal share for all groups."""
    recipe, groups, prices = run.resolved.recipe, run.resolved.groups, run.resolved.prices_left
    layers = decoder_layers(run.model, run.arch)
    now = sum(g.parts.num_units_left(layers[g.layer]) * prices.of(g) for g in groups)
    then = sum(run.resolved.plans[number - 1].num_keep[g.layer, g.name] * prices.of(g) for g in groups)
    return ProfileSettings(
        weighting=_weighting(recipe),
        shares=run.shares,
        damping=run.resolved.damping,
        obs_batch=recipe.choose.obs_batch,
        align=run.resolved.align,
        perturbation=1 - then / now,
        probe_blocks=recipe.choose.probe_blocks,
    )


def _weighting(recipe: Recipe) -> str:
    """Return the weighting of pooled statistics. Weights by domain act through the slopes."""
    return "energy" if recipe.choose.domain_weighting in BY_DOMAIN else recipe.choose.domain_weighting


@torch.no_grad()
def _scores(run: Run, number: int, batches: list[Batch]) -> dict[GroupKey, Tensor]:
    """Walk the model as it is and return every group's scores."""
    recipe = run.resolved.recipe
    walk = Walk(run.model, run.arch, [batch for batch in batches if not batch.held_out])
    scores: dict[GroupKey, Tensor] = {}
    choose, weighting = recipe.choose, _weighting(recipe)
    for index in range(run.arch.num_layers):
        mine = [group for group in run.resolved.groups if group.layer == index]
        for group in mine:
            is_last, seed = group is mine[-1], layer_seed(recipe.seed, number, index)
            pooled = measure(walk, group, weighting, run.shares, gram=needs_gram(choose.score), to_end=is_last).pooled
            facts = (walk.layers[index], group, pooled, choose.score, recipe.repair.damping, seed)
            scores[index, group.name] = from_first(partial(unit_scores, *facts))
        if not mine:
            walk.advance(index)
        run.services.progress("score", index + 1, run.arch.num_layers)
    return scores


def layer_seed(seed: int, number: int, layer: int) -> int:
    """Return a different seed for each layer and round."""
    return (seed * 1_000_003 + number) * 1_000_003 + layer
