"""A round's plan: how many units each group keeps when it is over, by the recipe's budget.

In: a run whose model stands where the round begins, the round's batches. Out: the plan. Nothing is cut.
"""

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
from secateur.stream.measure import measure
from secateur.stream.statistics import BY_DOMAIN
from secateur.stream.walk import Walk


def plan_round(
    run: Run, number: int, batches: list[Batch], max_rise: dict[str, float], scores: dict[GroupKey, Tensor]
) -> Plan:
    """Return the plan of round `number`.

    `max_rise`: how much each protected domain's loss may still rise. `scores`: those of `whole_model_scores`.
    Raises RecipeError if the round's share cannot go within what the recipe protects.
    """
    resolved = run.resolved
    recipe = resolved.recipe
    if recipe.choose.budget == "uniform":
        return resolved.plans[number - 1]

    def made() -> dict[str, Any]:
        return _as_json(_planned(run, number, batches, max_rise, scores))

    return _from_json(run.services.store.value(f"round-{number}-plan", made))


def _planned(
    run: Run, number: int, batches: list[Batch], max_rise: dict[str, float], scores: dict[GroupKey, Tensor]
) -> Plan:
    resolved = run.resolved
    recipe, prices = resolved.recipe, resolved.prices_left
    remove = resolved.removals[number - 1]
    least = least_keep(resolved.groups, resolved.align, recipe.remove.min_keep)
    if recipe.choose.budget == "global":
        scores = scores or _scores(run, number, batches)
        align, found = resolved.align, scores
        return from_first(lambda: global_plan(resolved.groups, found, prices, remove, align, min_keep=least))
    settings = _profile_settings(run, number)
    profiles = profile(
        run.model, run.arch, resolved.groups, batches, settings, decide=from_first, progress=run.services.progress
    )
    plan = from_first(lambda: curve_plan(resolved.groups, profiles, prices, remove, min_keep=least, max_rise=max_rise))
    predicted = predicted_rise(profiles, plan.num_keep)
    run.services.log.write({"event": "plan", "round": number, "budget": "curve", "predicted_rise": predicted})
    return plan


def _as_json(plan: Plan) -> dict[str, Any]:
    num_keep = [[*key, number] for key, number in plan.num_keep.items()]
    return {"num_keep": num_keep, "cost_before": plan.cost_before, "cost_after": plan.cost_after}


def _from_json(found: dict[str, Any]) -> Plan:
    num_keep = {(layer, name): number for layer, name, number in found["num_keep"]}
    return Plan(num_keep, found["cost_before"], found["cost_after"])


def whole_model_scores(run: Run, number: int, batches: list[Batch]) -> dict[GroupKey, Tensor]:
    """Return round `number`'s scores that need gradients of the whole model; none for those that look at a group."""
    score = find_score(run.resolved.recipe.choose.score)
    if score.needs != "gradients":
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
    """Return the settings; slopes are measured where this round would take every group if all lost alike."""
    recipe, groups, prices = run.resolved.recipe, run.resolved.groups, run.resolved.prices_left
    layers = decoder_layers(run.model, run.arch)
    now = sum(g.parts.num_units_left(layers[g.layer]) * prices.of(g) for g in groups)
    then = sum(run.resolved.plans[number - 1].num_keep[g.layer, g.name] * prices.of(g) for g in groups)
    # What a domain's weight does to a width is left to the slopes, which are by domain.
    weighting = "energy" if recipe.choose.domain_weighting in BY_DOMAIN else recipe.choose.domain_weighting
    return ProfileSettings(
        weighting=weighting,
        shares=run.shares,
        damping=run.resolved.damping,
        obs_batch=recipe.choose.obs_batch,
        align=run.resolved.align,
        perturbation=1 - then / now,
        probe_blocks=recipe.choose.probe_blocks,
    )


@torch.no_grad()
def _scores(run: Run, number: int, batches: list[Batch]) -> dict[GroupKey, Tensor]:
    """Walk the model as it is and return every group's scores."""
    recipe = run.resolved.recipe
    walk = Walk(run.model, run.arch, [batch for batch in batches if not batch.held_out])
    scores: dict[GroupKey, Tensor] = {}
    weighting = "energy" if recipe.choose.domain_weighting in BY_DOMAIN else recipe.choose.domain_weighting
    for index in range(run.arch.num_layers):
        mine = [group for group in run.resolved.groups if group.layer == index]
        for group in mine:
            is_last = group is mine[-1]
            measured = measure(walk, group, weighting, run.shares, gram=needs_gram(recipe.choose.score), to_end=is_last)
            seed = layer_seed(recipe.seed, number, index)
            found = partial(
                unit_scores,
                walk.layers[index],
                group,
                measured.pooled,
                recipe.choose.score,
                recipe.repair.damping,
                seed,
            )
            scores[index, group.name] = from_first(found)
        if not mine:
            walk.advance(index)
        run.services.progress("score", index + 1, run.arch.num_layers)
    return scores


def layer_seed(seed: int, number: int, layer: int) -> int:
    """Return a seed of its own for each layer and round."""
    return (seed * 1_000_003 + number) * 1_000_003 + layer
