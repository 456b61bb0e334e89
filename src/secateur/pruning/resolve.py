"""From a recipe and an architecture to plain numbers and plans; errors that need no weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from secateur.errors import RecipeError
from secateur.facts import Outcome
from secateur.files import parse_count, parse_size
from secateur.methods.budget import (
    Plan,
    Prices,
    default_align,
    largest_remove,
    least_keep,
    least_step,
    levels_of,
    plan_of,
    round_down,
    round_plans,
    round_shares,
    uniform_plan,
)
from secateur.methods.prices import kv_cache_bytes_per_token, prices_of, sequence_length, token_prices
from secateur.methods.scores import find_score
from secateur.model.bind import EXPERTS, Arch
from secateur.model.group import OF_EXPERTS, Group, GroupKey
from secateur.plugins import PROSE
from secateur.pruning.open import Opened
from secateur.pruning.resolve_depth import depth_of, groups_of, layers_to_expect, num_rounds, share_for_widths
from secateur.recipe import Recipe
from secateur.stream.statistics import BY_DOMAIN


def check_experts(recipe: Recipe, groups: Sequence[Group]) -> None:
    """Raise RecipeError for what experts do not support, or what only experts support."""
    have_experts = any(group.kind in OF_EXPERTS for group in groups)
    if have_experts and (recipe.choose.budget != "uniform" or recipe.remove.target != "parameters"):
        raise RecipeError(
            f"remove.groups: experts and their channels can only go with budget: uniform and target: parameters, "
            f"got {recipe.choose.budget} and {recipe.remove.target}; change these or leave experts out."
        )
    units = find_score(recipe.choose.score).units
    if have_experts and units == "channels and heads":
        raise RecipeError(
            f"choose.score: {recipe.choose.score} is of channels and heads, not of experts; "
            f"use obs, or leave experts out of groups."
        )
    if have_experts and recipe.choose.domain_weighting in BY_DOMAIN:
        raise RecipeError(
            f"choose.domain_weighting: {recipe.choose.domain_weighting} looks at one reader's cut, which experts and "
            f"their channels do not have; use energy or tokens, or leave experts out of groups."
        )
    other = next((group.name for group in groups if group.kind != "experts"), None)
    if other and units == "experts":
        raise RecipeError(
            f"choose.score: {recipe.choose.score} is of whole experts, groups has {other} too; "
            f"use obs, or groups: [experts]."
        )


# Least squares wants this many tokens per reader input; with 1/n of them the damping is at least n
# times its default. `At least`, so that resolving a saved recipe changes nothing.
TOKENS_PER_INPUT = 10
DEFAULT_TOKENS_PER_INPUT = 16
MIN_DEFAULT_TOKENS = 51200
DEFAULT_TARGET_MIX = 0.5
# With 15% of SmolLM2's channels perplexity is 10 to 20 times the dense one: LOG, 2026-11-25.
DEEP_KEEP = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A run in plain numbers. `recipe`: as saved, with every model-dependent `None` filled.

    `align` to `damping`: the recipe's keys of these names. `arch`, `prices`: the dense model's.
    `removals`: the share of the target's total that is gone after each round.
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

    def outcome(self, num_keep: Mapping[GroupKey, int]) -> Outcome:
        """Return how much of the target is gone if only these units and `layers` are left."""
        left = self.prices_left
        share = 1 - (left.total - left.gone(self.groups, num_keep)) / self.prices.total
        return Outcome(self.recipe.remove.target, self.prices.total_text, share)

    def with_layers(self, layers: tuple[int, ...]) -> "Resolved":
        """Return the run with these layers. Raises RecipeError if widths cannot give the rest."""
        recipe, prices = self.recipe, self.prices
        groups = groups_of(recipe, self.arch, layers)
        if self.kept is not None:
            plan = plan_of(groups, prices.with_only(layers), dict(self.kept))
            return replace(self, layers=layers, groups=groups, plans=(plan,), removals=(plan.removed_share,))
        remove = 0.0
        if groups:
            step = least_step(groups, prices, self.align, alike=recipe.choose.budget == "uniform")
            gone = prices.tokens + prices.of_all_but(layers)
            remove = share_for_widths(recipe, self.depth, prices, gone, step)
        rounds = num_rounds(recipe) if remove > 0 else 1
        recipe = recipe.filled(choose={"widths": _widths(recipe, cuts=remove > 0), "rounds": rounds})
        shares = round_shares(rounds, recipe.choose.schedule)
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
    if recipe.remove.target != "latency" and recipe.remove.prices is not None:
        target = recipe.remove.target
        raise RecipeError(f"remove.prices: are what target latency plans with; with target {target} leave them out.")
    num_rounds(recipe)
    if config.get_text_config() is not config and (recipe.choose.budget != "uniform" or recipe.remove.protected_layers):
        raise RecipeError(
            f"choose.budget: {recipe.choose.budget} with protected_layers {list(recipe.remove.protected_layers)} gives "
            f"layers widths of their own, which a language model inside a larger class ({config.model_type}) cannot be "
            f"saved with; use budget uniform without protected_layers."
        )
    length = sequence_length(recipe.calibration.sequence_length, config)
    if recipe.remove.vocabulary is not None:
        token_prices(recipe.remove.target, opened.model, 1, length)
    if recipe.remove.vocabulary == "auto" and recipe.remove.groups and "ffn" not in recipe.remove.groups:
        raise RecipeError(
            f"remove.vocabulary: auto weighs tokens against FFN channels, which groups {list(recipe.remove.groups)} do "
            "not have; say how many tokens stay, add ffn, or set vocabulary: null."
        )
    _target_mix(recipe, arch)
    return _with_share(opened, groups)


def _with_share(opened: Opened, groups: tuple[Group, ...]) -> Opened:
    """Return `opened`, the recipe's share from its `to` or `fit`. Raises RecipeError for no such size.

    share = (parameters - those that may stay) / parameters. Equal widths are the nearest to a share,
    so half of their step is added: the result is never larger than asked.
    """
    recipe, size = opened.recipe, opened.size
    remove = recipe.remove
    if remove.to is not None:
        asked, stays = f"to: {remove.to}", parse_count("remove.to", remove.to)
    elif remove.fit is not None:
        cache = (remove.context or 0) * kv_cache_bytes_per_token(opened.model)
        asked = f"fit: {remove.fit}" + f" with a cache of {cache / 1e9:.3g} GB" * bool(cache)
        stays = int((parse_size("remove.fit", remove.fit) - cache) * size.num_params / size.num_bytes)
    else:
        return opened
    if not 0 < stays < size.num_params:
        raise RecipeError(
            f"remove.{asked} leaves {max(stays, 0):,} parameters, and the model has {size.num_params:,} "
            f"({size.num_bytes / 1e9:.3g} GB); give a smaller model's size that is above 0."
        )
    step = 0
    if groups and recipe.choose.budget == "uniform":
        prices = recipe_prices(recipe, opened.arch, opened.model)
        step = least_step(groups, prices, remove.align or default_align(groups), alike=True)
    share = (size.num_params - stays + step / 2) / size.num_params
    filled: dict[str, Any] = {"share": min(share, 0.9999), "to": None, "fit": None, "context": None}
    return replace(opened, recipe=recipe.filled(remove=filled))


def recipe_prices(recipe: Recipe, arch: Arch, model: Any) -> Prices:
    """Return the model's prices by the recipe's target and groups. Raises as `prices_of`."""
    remove, length = recipe.remove, sequence_length(recipe.calibration.sequence_length, model.config)
    groups = arch.select(remove.group_names)
    return prices_of(remove.target, arch, groups, model, prompt_tokens=length, seconds=remove.prices)


def resolve(opened: Opened) -> Resolved:
    """Fill what depends on the model and make plans. Raises RecipeError for what is unreachable."""
    recipe, arch, config = opened.recipe, opened.arch, opened.model.config
    prices = recipe_prices(recipe, arch, opened.model)
    if opened.trim is not None:
        kept, length = opened.trim.kept, sequence_length(recipe.calibration.sequence_length, config)
        num_gone = kept.num_dense - len(kept.dense_ids)
        tokens = token_prices(recipe.remove.target, opened.model, num_gone, length)
        prices = replace(prices, tokens=tokens)
        recipe = recipe.filled(remove={"vocabulary": len(kept.dense_ids)})
    depth = depth_of(recipe, arch, config, prices)
    recipe = recipe.filled(remove={"depth": depth})
    layers = layers_to_expect(recipe, arch, config)
    groups = groups_of(recipe, arch, layers)
    # A layer is folded into the FFN reader before it.
    fitted = groups + (arch.select(("ffn",)) if depth else ())
    text, widest = text_for(recipe, fitted, config)
    damping, warnings = _damping(recipe, text["num_tokens"], widest)
    remove = {"align": recipe.remove.align or default_align(groups), "depth": depth}
    repair: dict[str, Any] = {"damping": damping, "target_mix": _target_mix(recipe, arch)}
    recipe = recipe.filled(remove=remove, repair=repair, calibration=text)
    if recipe.polish.num_tokens is None:
        trains = bool(groups or depth) and recipe.repair.compensate == "least_squares" and recipe.recover is None
        recipe = recipe.filled(polish={"num_tokens": text["num_tokens"] if trains else 0})
    facts: dict[str, Any] = {"recipe": recipe, "arch": arch, "prices": prices, "layers": layers, "warnings": warnings}
    facts["kept"] = opened.like and opened.like.num_keep
    resolved = Resolved(**facts, **remove, **repair, **text).with_layers(layers)
    warnings += _too_deep(resolved.groups, resolved.plans[-1]) + _idle_rounds(resolved) + _technical_alone(recipe)
    return replace(resolved, warnings=warnings)


def text_for(recipe: Recipe, groups: Sequence[Group], config: Any) -> tuple[dict[str, Any], int]:
    """Return `num_tokens` and `sequence_length`, filled, and the widest reader's inputs."""
    widest = max((group.num_inputs for group in groups), default=1)
    num_tokens = recipe.calibration.num_tokens or max(MIN_DEFAULT_TOKENS, DEFAULT_TOKENS_PER_INPUT * widest)
    length = sequence_length(recipe.calibration.sequence_length, config)
    return {"num_tokens": num_tokens, "sequence_length": length}, widest


def _too_deep(groups: tuple[Group, ...], plan: Plan) -> tuple[str, ...]:
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


def _technical_alone(recipe: Recipe) -> tuple[str, ...]:
    """Return a warning if a run measures on installed text without any general prose."""
    if any(d.installed in PROSE or not (d.installed or d.sampled) for d in recipe.calibration.domains.values()):
        return ()
    return (
        "calibration.domains: no general prose that people wrote, so text unlike these domains suffers most; give your "
        "own text, or run pip install --no-deps exllamav3, whose calibration text is read as data.",
    )


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
    _check_least(recipe, groups, plan, remove, prices)
    return round_plans(groups, prices, plan, shares, align)


def _widths(recipe: Recipe, *, cuts: bool) -> str:
    """Return the recipe's `widths`, filled. Raises RecipeError if they do not fit the rest."""
    reasons = [f"budget {recipe.choose.budget}"] * (recipe.choose.budget != "uniform")
    reasons += ["protected_layers"] * bool(recipe.remove.protected_layers)
    if not cuts or not reasons:
        return recipe.choose.widths or "uniform"
    if recipe.choose.widths == "uniform":
        raise RecipeError(
            f"choose.widths: uniform cannot be met with {reasons[0]}, which gives layers widths of their own; "
            f"leave it out, or use budget uniform without protected_layers."
        )
    return "per_layer"


def _check_within_reach(resolved: Resolved, remove: float) -> None:
    """Raise RecipeError if a budget that measures could not reach the target at all."""
    recipe, groups, prices = resolved.recipe, resolved.groups, resolved.prices_left
    if recipe.choose.budget == "uniform":
        return
    least = least_keep(groups, resolved.align, recipe.remove.min_keep)
    if recipe.choose.budget != "global":
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


def _check_least(recipe: Recipe, groups: tuple[Group, ...], plan: Plan, remove: float, prices: Prices) -> None:
    if recipe.choose.budget != "uniform":
        return
    for group in groups:
        left = plan.num_keep[group.layer, group.name] / group.num_units
        if left < recipe.remove.min_keep:
            raise RecipeError(
                f"remove.min_keep: {recipe.remove.min_keep:g} of each group is to stay, but removing {remove:g} of all "
                f"{prices.total_text} leaves {left:.3f} of {group.name}; lower min_keep or remove less."
            )


def _target_mix(recipe: Recipe, arch: Arch) -> float:
    possible = arch.mlp_adds_directly and recipe.repair.compensate == "least_squares"
    if recipe.repair.target_mix is None:
        return DEFAULT_TARGET_MIX if possible else 0.0
    if recipe.repair.target_mix > 0 and not arch.mlp_adds_directly:
        raise RecipeError(
            f"repair.target_mix: family {arch.family} normalises what an MLP gives before adding it, so no drift can "
            f"be made up for; got {recipe.repair.target_mix:g}, set it to 0 or leave it out."
        )
    return recipe.repair.target_mix if recipe.repair.compensate == "least_squares" else 0.0


def _damping(recipe: Recipe, num_tokens: int, widest: int) -> tuple[float, tuple[str, ...]]:
    needed = TOKENS_PER_INPUT * widest
    raised = Recipe().repair.damping * needed / num_tokens
    if recipe.repair.compensate != "least_squares" or num_tokens >= needed or recipe.repair.damping >= raised:
        return recipe.repair.damping, ()
    warning = (
        f"calibration.num_tokens: {num_tokens:,} tokens are few for least squares over {widest:,} channels "
        f"(want {needed:,}), so damping rises from {recipe.repair.damping:g} to {raised:g}."
    )
    return raised, (warning,)
