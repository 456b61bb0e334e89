"""From a recipe and an architecture to plain numbers and plans; errors that need no weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

from secateur.errors import CheckpointError, RecipeError
from secateur.files import is_size, parse_count, parse_size
from secateur.formats.gguf import check_type, gguf_bytes, metadata_bytes
from secateur.methods.budget import (
    ALIGN_BLOCKS,
    Plan,
    Prices,
    default_align,
    largest_remove,
    least_keep,
    least_step,
    levels_of,
    params_gone,
    plan_of,
    round_down,
    round_plans,
    round_shares,
    uniform_plan,
)
from secateur.methods.prices import kv_cache_bytes_per_token, prices_of, sequence_length, token_prices
from secateur.model.bind import EXPERTS, Arch
from secateur.model.group import Group, GroupKey
from secateur.pruning.group_step import model_left
from secateur.pruning.open import Opened, tokenizer_of
from secateur.pruning.resolve_parts import (
    check_experts,
    check_least,
    damping_for,
    depth_of,
    groups_of,
    layers_to_expect,
    share_for_widths,
    target_mix_of,
    technical_alone,
    text_for,
    too_deep,
)
from secateur.recipe import Recipe
from secateur.recovery.pair import check_training


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A run in plain numbers. `recipe`: as saved, with every model-dependent `None` filled.

    `align` to `damping`: the recipe's keys of these names. `arch`, `prices`: the dense model's.
    `removals`: the share of all parameters that is gone after each round.
    `plans`: one per round, the last is the target; budgets other than `uniform` depart from them.
    `groups`: those that lose units, so none of protected layers.
    `layers`: those that stay, by their dense numbers; the last ones go as long as none is measured.
    All else counts from the model that these layers make, and numbers layers as it does.
    `kept`: how many units of each group stay, if another result has chosen them.
    """

    recipe: Recipe
    align: int
    depth: int
    num_tokens: int
    sequence_length: int
    target_mix: float
    damping: float
    arch: Arch
    prices: Prices
    layers: tuple[int, ...]
    groups: tuple[Group, ...] = ()
    plans: tuple[Plan, ...] = ()
    removals: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()
    kept: Mapping[GroupKey, int] | None = None

    @property
    def prices_left(self) -> Prices:
        """The prices of the model that `layers` make; plans count in these."""
        return self.prices.with_only(self.layers)

    def with_layers(self, layers: tuple[int, ...]) -> "Resolved":
        """Return the run with these layers. Raises RecipeError if widths cannot give the rest."""
        recipe, prices = self.recipe, self.prices
        groups = groups_of(recipe, self.arch, layers)
        if self.kept is not None:
            plan = plan_of(groups, prices.with_only(layers), dict(self.kept))
            return replace(self, layers=layers, groups=groups, plans=(plan,), removals=(plan.removed_share,))
        remove = 0.0
        if groups:
            step = least_step(groups, self.align, alike=recipe.choose.budget == "uniform")
            gone = prices.tokens + prices.of_all_but(layers)
            remove = share_for_widths(recipe, self.depth, prices, gone, step)
        rounds = recipe.choose.rounds if remove > 0 else 1
        recipe = recipe.filled(choose={"rounds": rounds})
        shares = round_shares(rounds)
        removals = tuple(remove * share for share in shares)
        moved = replace(self, recipe=recipe, layers=layers, groups=groups, removals=removals)
        return replace(moved, plans=tuple(_plans(moved, remove, shares)))


def checked(opened: Opened) -> Opened:
    """Return `opened`, the recipe's `groups` filled in: what holds most of such a model.

    Raises ArchError or RecipeError for what this model cannot do.
    """
    if opened.recipe.remove.groups is None:
        has_experts = any(group.name == EXPERTS for group in opened.arch.groups)
        groups = (EXPERTS,) if has_experts else ("ffn",)
        opened = replace(opened, recipe=opened.recipe.filled(remove={"groups": groups}))
    recipe, arch, config = opened.recipe, opened.arch, opened.model.config
    parse_size("output.max_shard_size", recipe.output.max_shard_size)
    groups = groups_of(recipe, arch, layers_to_expect(recipe, arch, config))
    if recipe.repair.compensate == "bias" and any(group.bias_switch is None for group in groups):
        raise RecipeError(
            f"repair.compensate: family {arch.family} cannot store a bias in its readers (it would be dropped on "
            f"reload); use least_squares or none."
        )
    check_experts(recipe, groups)
    if config.get_text_config() is not config and (recipe.choose.budget != "uniform" or recipe.remove.protected_layers):
        raise RecipeError(
            f"choose.budget: {recipe.choose.budget} with protected_layers {list(recipe.remove.protected_layers)} gives "
            f"layers widths of their own, which a language model inside a larger class ({config.model_type}) cannot be "
            f"saved with; use budget uniform without protected_layers."
        )
    sequence_length(recipe.calibration.sequence_length, config)
    if recipe.remove.vocabulary == "auto" and recipe.remove.groups and "ffn" not in recipe.remove.groups:
        raise RecipeError(
            f"remove.vocabulary: auto weighs tokens against FFN channels, which groups {list(recipe.remove.groups)} do "
            "not have; say how many tokens stay, add ffn, or set vocabulary: null."
        )
    target_mix_of(recipe, arch)
    return _with_share(opened, groups)


def _with_share(opened: Opened, groups: tuple[Group, ...]) -> Opened:
    """Return `opened`, the recipe's share from its `to` or `fit`.

    share = (parameters - those that may stay) / parameters. Equal widths are the nearest to a share,
    so half of their step is added: the result is never larger than asked. Raises RecipeError for a size
    that is none, or less than a cut can leave, with the least that it can.
    """
    recipe, size = opened.recipe, opened.size
    remove = recipe.remove
    if remove.to is not None and not is_size(remove.to):
        asked, stays = f"to: {remove.to}", parse_count("remove.to", remove.to)
    elif given := remove.fit or remove.to:
        key, cache_bytes = "fit" if remove.fit else "to", 0
        if remove.context:  # llama.cpp's cache is f16
            itemsize = 2 if remove.type else opened.model.dtype.itemsize
            cache_bytes = (
                remove.context * kv_cache_bytes_per_token(opened.model) * itemsize // opened.model.dtype.itemsize
            )
        asked = f"{key}: {given}" + f" with a cache of {cache_bytes / 1e9:.3g} GB" * bool(cache_bytes)
        num_bytes = parse_size(f"remove.{key}", given) - cache_bytes
        if remove.type is not None:
            return _with_type(opened, groups, asked, num_bytes)
        stays = int(num_bytes * size.num_params / size.num_bytes)
    else:
        return opened
    if not 0 < stays < size.num_params:
        raise RecipeError(
            f"remove.{asked} leaves {max(stays, 0):,} parameters, and the model has {size.num_params:,} "
            f"({size.num_bytes / 1e9:.3g} GB); give a smaller model's size that is above 0."
        )
    step, align = 0, remove.align
    if groups and recipe.choose.budget == "uniform":
        prices = prices_of(opened.arch, opened.model)
        align = align_for(recipe.filled(remove={"share": 1 - stays / size.num_params}), groups, prices)
        step = least_step(groups, align, alike=True)
    share = (size.num_params - stays + step / 2) / size.num_params
    found = replace(opened, recipe=_of_share(recipe, min(share, 0.9999), align))
    if remove.vocabulary is None:  # otherwise it is not known yet what the tokens take
        try:
            resolve(found)
        except RecipeError:
            if (most := nearest_run(found, 1.0)) is None or most.recipe.remove.share > found.recipe.remove.share:
                raise
            left = most.prices_left.total - params_gone(most.groups, most.plans[-1].num_keep)
            if left <= stays:  # half a step beyond the last one
                return replace(found, recipe=_of_share(recipe, most.recipe.remove.share, align))
            num_bytes = left * size.num_bytes // size.num_params
            raise _too_small(asked, f"{left:,} parameters ({num_bytes / 1e6:.4g} MB)") from None
    return found


def _of_share(recipe: Recipe, share: float, align: int | None) -> Recipe:
    """Return the recipe with this share in place of a size."""
    sizes: dict[str, Any] = dict.fromkeys(("to", "fit", "context", "type"))
    return recipe.filled(remove={**sizes, "share": share, "align": align})


def _too_small(asked: str, least: str) -> RecipeError:
    return RecipeError(
        f"remove.{asked} is less than a cut can leave; the recipe's groups leave {least} at least; give that or more, "
        f"lower align or min_keep, or name more groups."
    )


# Shares among which one that can be is looked for, and how near the answer comes to the best.
SHARES, NEAR = tuple(number / 50 for number in range(1, 50)), 1e-4


def nearest_run(opened: Opened, share: float, fits: Callable[[Resolved], bool] = lambda run: True) -> Resolved | None:
    """Return the run of the share nearest to `share` that can be and `fits`; None if there is none.

    What can be is a range of shares. Of the tried ones the nearest lies within a step of its end.
    """

    def at(tried: float) -> Resolved | None:
        try:
            run = resolve(replace(opened, recipe=opened.recipe.filled(remove={"share": tried})))
        except RecipeError:
            return None
        return run if fits(run) else None

    shares = sorted(SHARES, key=lambda tried: abs(tried - share))
    found = next(((tried, run) for tried in shares if (run := at(tried)) is not None), None)
    if found is None:
        return None
    near, run = found
    far = near + min(max(share - near, -SHARES[0]), SHARES[0])
    while abs(far - near) > NEAR:
        middle = (near + far) / 2
        if (tried := at(middle)) is None:
            far = middle
        else:
            near, run = middle, tried
    return run


def _with_type(opened: Opened, groups: tuple[Group, ...], asked: str, num_bytes: int) -> Opened:
    """Return `opened` with the least share that leaves a GGUF file of at most so many bytes.

    k-quants store widths that are no multiple of their block in wider types, so a width may take more
    bytes than the next block does; both kinds of widths are searched.
    """
    recipe, type_name = opened.recipe, opened.recipe.remove.type
    assert type_name is not None
    check_type("remove.type", type_name)
    if recipe.choose.budget != "uniform" or recipe.remove.vocabulary is not None:
        given = "vocabulary" if recipe.remove.vocabulary is not None else f"budget {recipe.choose.budget}"
        raise RecipeError(
            f"remove.type: how many bytes {given} leaves in {type_name} shows in the run; leave type out, or prune by "
            f"uniform widths alone, after secateur trim."
        )
    try:
        metadata = metadata_bytes(opened.model.config, tokenizer_of(opened), opened.name)
    except CheckpointError:  # a config alone
        metadata = 0

    @cache
    def bytes_left(layers: tuple[int, ...], kept: tuple[tuple[GroupKey, int], ...]) -> int:
        return gguf_bytes(model_left(opened.model.config, layers, dict(kept)), type_name, metadata, opened.name)

    def of(run: Resolved) -> int:
        return bytes_left(run.layers, tuple(run.plans[-1].num_keep.items()))

    dense = gguf_bytes(opened.model, type_name, metadata, opened.name)
    if not 0 < num_bytes < dense:
        raise RecipeError(
            f"remove.{asked} leaves {max(num_bytes, 0):,} bytes, and the dense model takes {dense:,} in {type_name}; "
            f"give a smaller size that is above 0."
        )
    prices = prices_of(opened.arch, opened.model)
    own = align_for(recipe.filled(remove={"share": 1 - num_bytes / dense}), groups, prices)
    aligned = [replace(opened, recipe=_of_share(recipe, 0.5, align)) for align in {own, math.lcm(own, ALIGN_BLOCKS)}]
    runs = [run for each in aligned if (run := nearest_run(each, 0.0, lambda run: of(run) <= num_bytes)) is not None]
    if not runs:
        runs = (nearest_run(each, 1.0) for each in aligned)
        least = min((of(run) for run in runs if run is not None), default=dense)
        raise _too_small(asked, f"{least:,} bytes in {type_name}")
    best = min(runs, key=lambda run: run.recipe.remove.share).recipe.remove
    return replace(opened, recipe=_of_share(recipe, best.share, best.align))


def align_for(recipe: Recipe, groups: tuple[Group, ...], prices: Prices, gone: int = 0) -> int:
    """Return the recipe's `align`, or the default for the widths that are left.

    `gone`: what layers and tokens take of the share.
    """
    units = sum(group.num_units * group.params_per_unit for group in groups)
    asked = recipe.remove.share * prices.total - gone
    return recipe.remove.align or default_align(groups, 1 - asked / units if units else 0.0)


def resolve(opened: Opened) -> Resolved:
    """Fill what depends on the model and make plans. Raises RecipeError for what is unreachable."""
    recipe, arch, config = opened.recipe, opened.arch, opened.model.config
    prices = prices_of(opened.arch, opened.model)
    if opened.trim is not None:
        kept = opened.trim.kept
        num_gone = kept.num_dense - len(kept.dense_ids)
        tokens = token_prices(opened.model, num_gone)
        prices = replace(prices, tokens=tokens)
        recipe = recipe.filled(remove={"vocabulary": len(kept.dense_ids)})
    depth = depth_of(recipe, arch, config, prices)
    recipe = recipe.filled(remove={"depth": depth})
    layers = layers_to_expect(recipe, arch, config)
    groups = groups_of(recipe, arch, layers)
    # A layer is folded into the FFN reader before it.
    fitted = groups + (arch.select(("ffn",)) if depth else ())
    text, widest = text_for(recipe, fitted, config)
    damping, warnings = damping_for(recipe, text["num_tokens"], widest)
    left = prices.with_only(layers)
    remove = {"align": align_for(recipe, groups, prices, prices.total - left.total), "depth": depth}
    repair: dict[str, Any] = {"damping": damping, "target_mix": target_mix_of(recipe, arch)}
    recipe = recipe.filled(remove=remove, repair=repair, calibration=text)
    if recipe.polish.num_tokens is None:
        trains = bool(groups or depth) and recipe.repair.compensate == "least_squares"
        recipe = recipe.filled(polish={"num_tokens": text["num_tokens"] if trains else 0})
    if recipe.polish.num_tokens:
        check_training(recipe.polish, "polish")
    facts: dict[str, Any] = {"recipe": recipe, "arch": arch, "prices": prices, "layers": layers, "warnings": warnings}
    facts["kept"] = opened.like and opened.like.num_keep
    resolved = Resolved(**facts, **remove, **repair, **text).with_layers(layers)
    warnings += too_deep(resolved.groups, resolved.plans[-1]) + _idle_rounds(resolved) + technical_alone(recipe)
    return replace(resolved, warnings=warnings)


def _idle_rounds(resolved: Resolved) -> tuple[str, ...]:
    """Return a warning if rounds are more than the steps between the widths' multiples of `align`."""
    plans, uniform = resolved.plans, resolved.recipe.choose.budget == "uniform"
    widths = [{(each.layer, each.name): each.num_units for each in resolved.groups}, *(p.num_keep for p in plans)]
    idle = sum(before == after for before, after in pairwise(widths))
    if not uniform or not idle or len(plans) == 1:
        return ()
    return (
        f"choose.rounds: in {idle} of {len(plans)} rounds nothing goes, as widths are multiples of {resolved.align}; "
        f"{len(plans) - idle} rounds, or a smaller remove.align, would not measure for nothing.",
    )


def _plans(resolved: Resolved, remove: float, shares: list[float]) -> list[Plan]:
    """Return the rounds' plans for the widths' part of the removal, which may be nothing."""
    recipe, groups, prices = resolved.recipe, resolved.groups, resolved.prices_left
    if remove == 0:
        return [plan_of(groups, prices, {(group.layer, group.name): group.num_units for group in groups})]
    _check_within_reach(resolved, remove)
    # Other budgets only count with this plan and spread it over layers in their own steps.
    align = resolved.align if recipe.choose.budget == "uniform" else 1
    plan = uniform_plan(groups, prices, remove, align)
    check_least(recipe, groups, plan, remove, prices)
    return round_plans(groups, prices, plan, shares, align)


def _check_within_reach(resolved: Resolved, remove: float) -> None:
    """Raise RecipeError if a budget that measures could not reach the target at all."""
    recipe, groups, prices = resolved.recipe, resolved.groups, resolved.prices_left
    if recipe.choose.budget == "uniform":
        return
    least = least_keep(groups, resolved.align, recipe.remove.min_keep)
    for group in groups:
        levels = levels_of(group, group.num_units, resolved.align)
        key = (group.layer, group.name)
        least[key] = min(level for level in levels if level >= least[key])
    largest = largest_remove(groups, prices, least)
    if remove > largest:
        raise RecipeError(
            f"remove: {remove:g} of all {prices.total_text} is out of reach; the recipe's groups allow at most "
            f"{round_down(largest)} with each at its smallest width; ask for less, lower min_keep or align, or "
            f"remove more whole layers (depth)."
        )
