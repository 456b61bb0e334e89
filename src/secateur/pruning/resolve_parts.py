"""The parts of `resolve`: layers that go and what they leave for the widths, text, ridge, warnings.

No weight is read. All layers of a family have equal sizes, so which ones go changes no number.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from secateur.errors import RecipeError
from secateur.methods.budget import Plan, Prices
from secateur.methods.prices import sequence_length
from secateur.methods.scores import find_score
from secateur.model.bind import Arch
from secateur.model.group import OF_EXPERTS, Group
from secateur.plugins import PROSE
from secateur.recipe import Recipe

# Layers go for the share of units beyond UNITS_ALONE: LAYERS_PER_UNIT times that share of layers.
UNITS_ALONE, LAYERS_PER_UNIT = 0.5, 0.8
# Least squares wants this many tokens per reader input; with 1/n of them the damping is at least n
# times its default. `At least`, so that resolving a saved recipe changes nothing.
TOKENS_PER_INPUT = 10
DEFAULT_TOKENS_PER_INPUT = 16
MIN_DEFAULT_TOKENS = 51200
DEFAULT_TARGET_MIX = 0.5
# With 15% of SmolLM2's channels perplexity is 10 to 20 times the dense one: LOG, 2026-11-25.
DEEP_KEEP = 0.3
# Readers used only to compare layers are fitted to this many tokens per input.
NARROW_TOKENS_PER_INPUT = 4


def protected_layers(recipe: Recipe, arch: Arch) -> set[int]:
    """Return the dense layers that stay whole. Raises RecipeError for a missing one."""
    return _layers_named("remove.protected_layers", recipe.remove.protected_layers, arch.num_layers)


def removed_layers(recipe: Recipe, arch: Arch) -> set[int]:
    """Return the layers that the recipe names for removal. Raises RecipeError if they cannot go."""
    named = _layers_named("remove.layers", recipe.remove.layers, arch.num_layers)
    shown = ", ".join(map(str, recipe.remove.layers))
    if len(named) < len(recipe.remove.layers):
        raise RecipeError(f"remove.layers: [{shown}] names a layer of {arch.num_layers} twice; name each once.")
    if both := sorted(named & protected_layers(recipe, arch)):
        raise RecipeError(f"remove.layers: layer {both[0]} is in protected_layers too; take it out of one of them.")
    if named and recipe.remove.depth not in (None, len(named)):
        raise RecipeError(
            f"remove.depth: {recipe.remove.depth} is not the number of remove.layers: [{shown}]; "
            f"leave depth out, or give {len(named)}."
        )
    return named


def _layers_named(key: str, layers: tuple[int, ...], num_layers: int) -> set[int]:
    for index in layers:
        if not -num_layers <= index < num_layers:
            end = num_layers - 1
            raise RecipeError(f"{key}: there is no layer {index}; use 0 to {end}, or {-num_layers} to -1 from the end.")
    return {index % num_layers for index in layers}


def layers_to_expect(recipe: Recipe, arch: Arch, config: Any) -> tuple[int, ...]:
    """Return the layers that stay, by their dense numbers.

    If the recipe does not name those that go, the last unprotected ones do; an unknown `depth` is
    0. Raises RecipeError if so many cannot go, or if layers differ in size.
    """
    named = removed_layers(recipe, arch)
    free = sorted(set(range(arch.num_layers)) - protected_layers(recipe, arch))
    if not free:
        raise RecipeError("remove.protected_layers: no layer is left to remove anything from; protect fewer.")
    depth = len(named) or recipe.remove.depth or 0
    if depth and getattr(config, "is_heterogeneous", False):
        raise RecipeError(
            f"remove.depth: {depth} layers cannot be removed from a model of per-layer widths (per_layer_config); "
            f"remove layers from the dense model, before widths."
        )
    if depth >= len(free):
        raise RecipeError(
            f"remove.depth: {depth} of {arch.num_layers} layers cannot be removed; one that is not in protected_layers "
            f"must stay, so ask for 0 to {len(free) - 1}."
        )
    gone = named or set(free[len(free) - depth :])
    return tuple(index for index in range(arch.num_layers) if index not in gone)


def depth_of(recipe: Recipe, arch: Arch, config: Any, prices: Prices) -> int:
    """Return how many whole layers go: the recipe's number, or a default.

    The first units are cheap to remove and the last ones ruin the model. With f the share of the
    recipe's units that would go if widths gave all, round(LAYERS_PER_UNIT * (f - UNITS_ALONE)) of
    all layers go, or none. Measured on SmolLM2-135M (LOG, 2026-11-25): 0 of 30 layers at 30% of all
    parameters, 4 at 40%, 8 at 50%. 0 too if the recipe has rounds or cuts no FFN, and if layers differ.
    """
    if recipe.remove.depth is not None or recipe.remove.layers:
        return len(recipe.remove.layers) if recipe.remove.depth is None else recipe.remove.depth
    groups = groups_of(recipe, arch, tuple(range(arch.num_layers)))
    choose, differ = recipe.choose, getattr(config, "is_heterogeneous", False)
    plain = choose.rounds == 1 and "ffn" in recipe.remove.group_names
    alike = len(set(arch.params_per_layer)) == 1 and not any(group.kind in OF_EXPERTS for group in groups)
    if not plain or not alike or not groups or differ:
        return 0
    asked, units = (
        recipe.remove.share * prices.total - prices.tokens,
        sum(group.num_units * group.params_per_unit for group in groups),
    )
    wanted = round(LAYERS_PER_UNIT * (asked / units - UNITS_ALONE) * arch.num_layers)
    free = arch.num_layers - len(protected_layers(recipe, arch))
    depth = max(0, min(wanted, int(asked // prices.per_layer[0]), free - 1))
    # If even then widths cannot give the rest, the error is to name what they give alone.
    return depth if asked - depth * prices.per_layer[0] < units * (free - depth) / free else 0


def groups_of(recipe: Recipe, arch: Arch, layers: tuple[int, ...]) -> tuple[Group, ...]:
    """Return the groups that lose units if only `layers` are left, numbered as they are then."""
    protected = protected_layers(recipe, arch)
    chosen = arch.select(recipe.remove.group_names)
    return tuple(
        dataclasses.replace(group, layer=number)
        for number, layer in enumerate(layers)
        for group in chosen
        if group.layer == layer and layer not in protected
    )


def check_experts(recipe: Recipe, groups: Sequence[Group]) -> None:
    """Raise RecipeError for what experts do not support, or what only experts support."""
    have_experts = any(group.kind in OF_EXPERTS for group in groups)
    if have_experts and recipe.choose.budget != "uniform":
        raise RecipeError(
            f"remove.groups: experts and their channels can only go with budget: uniform, got {recipe.choose.budget}; "
            "change it or leave experts out."
        )
    units = find_score(recipe.choose.score).units
    if have_experts and units == "channels and heads":
        raise RecipeError(
            f"choose.score: {recipe.choose.score} is of channels and heads, not of experts; "
            f"use obs, or leave experts out of groups."
        )
    other = next((group.name for group in groups if group.kind != "experts"), None)
    if other and units == "experts":
        raise RecipeError(
            f"choose.score: {recipe.choose.score} is of whole experts, groups has {other} too; "
            f"use obs, or groups: [experts]."
        )


def share_for_widths(recipe: Recipe, depth: int, prices: Prices, num_gone: int, step: int) -> float:
    """Return the widths' share of what layers and tokens leave; 0 if that is less than half a `step`.

    `num_gone`: the cost of the `depth` layers and the tokens that go. `step`: the least that the
    widths can give. Raises RecipeError if these alone take more than half a step too much.
    """
    asked = recipe.remove.share * prices.total
    if not num_gone:
        return recipe.remove.share
    if abs(asked - num_gone) <= step / 2:
        return 0.0
    if num_gone > asked and not depth:
        raise RecipeError(
            f"remove.vocabulary: the tokens that go are {num_gone / prices.total:.4f} of all {prices.total_text}, more "
            f"than remove: {recipe.remove.share:g}; keep more tokens, or remove at least that."
        )
    if num_gone > asked:
        per_layer = (num_gone - prices.tokens) // depth
        most, least = (
            int((asked - prices.tokens + step / 2) // per_layer),
            math.ceil(1e4 * num_gone / prices.total) / 1e4,
        )
        raise RecipeError(
            f"remove.depth: {depth} layers of {per_layer:,} parameters each make it {num_gone / prices.total:.3f} of "
            f"all {prices.total_text}, more than remove: {recipe.remove.share:g}; use depth {most} at most, "
            f"or remove at least {least:.4f}."
        )
    return (asked - num_gone) / (prices.total - num_gone)


def text_for(recipe: Recipe, groups: Sequence[Group], config: Any) -> tuple[dict[str, Any], int]:
    """Return `num_tokens` and `sequence_length`, filled, and the widest reader's inputs."""
    widest = max((group.num_inputs for group in groups), default=1)
    num_tokens = recipe.calibration.num_tokens or max(MIN_DEFAULT_TOKENS, DEFAULT_TOKENS_PER_INPUT * widest)
    length = sequence_length(recipe.calibration.sequence_length, config)
    return {"num_tokens": num_tokens, "sequence_length": length}, widest


def too_deep(groups: tuple[Group, ...], plan: Plan) -> tuple[str, ...]:
    """Return a warning per kind of unit of which less than `DEEP_KEEP` is left."""
    warnings: list[str] = []
    for name in dict.fromkeys(group.name for group in groups):
        members = [group for group in groups if group.name == name]
        kept = sum(plan.num_keep[group.layer, name] for group in members) / sum(group.num_units for group in members)
        if kept < DEEP_KEEP:
            warnings.append(
                f"{1 - kept:.0%} of all {name} units go, more than they can give without ruin; remove less, or spread "
                f"it: preset best, more groups, depth."
            )
    return tuple(warnings)


def technical_alone(recipe: Recipe) -> tuple[str, ...]:
    """Return a warning if a run measures on installed text without any general prose."""
    if any(d.installed in PROSE or not (d.installed or d.answers) for d in recipe.calibration.domains.values()):
        return ()
    return (
        "calibration.domains: no general prose that people wrote, so text unlike these domains suffers most; give your "
        "own text or `general`, a mixture from the hub, or run pip install --no-deps exllamav3, whose calibration text "
        "is read as data.",
    )


def target_mix_of(recipe: Recipe, arch: Arch) -> float:
    """Return the recipe's `target_mix`, filled. Raises RecipeError if the family cannot have it."""
    possible = arch.mlp_adds_directly and recipe.repair.compensate == "least_squares"
    if recipe.repair.target_mix is None:
        return DEFAULT_TARGET_MIX if possible else 0.0
    if recipe.repair.target_mix > 0 and not arch.mlp_adds_directly:
        raise RecipeError(
            f"repair.target_mix: family {arch.family} normalises what an MLP gives before adding it, so no drift can "
            f"be made up for; got {recipe.repair.target_mix:g}, set it to 0 or leave it out."
        )
    return recipe.repair.target_mix if recipe.repair.compensate == "least_squares" else 0.0


def damping_for(recipe: Recipe, num_tokens: int, widest: int) -> tuple[float, tuple[str, ...]]:
    """Return the recipe's `damping`, higher for few tokens, and then a warning."""
    needed = TOKENS_PER_INPUT * widest
    raised = Recipe().repair.damping * needed / num_tokens
    if recipe.repair.compensate != "least_squares" or num_tokens >= needed or recipe.repair.damping >= raised:
        return recipe.repair.damping, ()
    warning = (
        f"calibration.num_tokens: {num_tokens:,} tokens are few for least squares over {widest:,} channels "
        f"(want {needed:,}), so damping rises from {recipe.repair.damping:g} to {raised:g}."
    )
    return raised, (warning,)


def check_least(recipe: Recipe, groups: tuple[Group, ...], plan: Plan, remove: float, prices: Prices) -> None:
    """Raise RecipeError if the uniform widths leave less than `min_keep` of a group."""
    if recipe.choose.budget != "uniform":
        return
    for group in groups:
        left = plan.num_keep[group.layer, group.name] / group.num_units
        if left < recipe.remove.min_keep:
            raise RecipeError(
                f"remove.min_keep: {recipe.remove.min_keep:g} of each group is to stay, but removing {remove:g} of all "
                f"{prices.total_text} leaves {left:.3f} of {group.name}; lower min_keep or remove less."
            )
