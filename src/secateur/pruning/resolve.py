"""How much goes, in plain numbers: from a recipe and an architecture to whole layers, widths and
plans.

A recipe says it as a share or a size; both become a share of the parameters, and that
becomes whole layers and steps of widths. No weight is read. All layers of a family
have equal sizes, so which ones go changes no number.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.data.blocks import block_length
from secateur.errors import RecipeError
from secateur.files import is_size, parse_count, parse_size
from secateur.log import human_bytes
from secateur.methods.budget import (
    Plan,
    Prices,
    default_align,
    least_keep,
    least_step,
    levels_of,
    out_of_reach,
    params_gone,
    params_of,
    plan_of,
    prices_of,
    round_plans,
    round_shares,
    token_prices,
    uniform_plan,
)
from secateur.methods.scores import find_score
from secateur.model.bind import Arch
from secateur.model.group import OF_EXPERTS, Counts, Group, Groups, Keeps, by_name
from secateur.model.guesses import EXPERT_CHANNELS, EXPERTS, FFN, SHARED
from secateur.model.per_layer import why_not_per_layer
from secateur.plugins import PROSE
from secateur.pruning.open import Opened
from secateur.recipe import Recipe
from secateur.recovery.weights import check_training
from secateur.stream.statistics import BY_DOMAIN

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
# A size is no larger share than this: no recipe may name all.
MOST_SHARE = 0.9999
# Readers used only to compare layers are fitted to this many tokens per input.
NARROW_TOKENS_PER_INPUT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A run in plain numbers. `recipe`: as saved, with every model-dependent `None` filled.

    `align` to `damping`: the recipe's keys of these names. `arch`, `prices`: the dense model's.
    `layers`: those that stay, by their dense numbers; the last ones go as long as none is measured.
    All else counts from the model that these layers make, and numbers layers as it does.
    `groups`: those that lose units, so none of protected layers.
    `plans`: one per round, the last is the target; budgets other than `uniform` depart from them.
    `removals`: the share of all parameters that is gone after each round.
    `kept`: the units that stay, if another result has chosen them; else empty.
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
    groups: Groups
    kept: Keeps
    warnings: tuple[str, ...]
    plans: tuple[Plan, ...] = ()
    removals: tuple[float, ...] = ()

    @property
    def is_uniform(self) -> bool:
        """Whether all groups of a kind give the same share."""
        return self.recipe.choose.budget == "uniform"

    @property
    def prices_left(self) -> Prices:
        """The prices of the model that `layers` make; plans count in these."""
        return self.prices.with_only(self.layers)

    @property
    def step(self) -> int:
        """The parameters of the smallest step of the widths; 0 without any."""
        return least_step(self.groups, self.align, alike=self.is_uniform) if self.groups else 0

    @property
    def least_keep(self) -> Counts:
        """How many units of each group stay at least."""
        if self.is_uniform:
            return least_keep(self.groups, self.align)
        return {
            group.key: levels_of(group, group.num_units, self.align)[-1] for group in self.groups
        }

    @property
    def largest(self) -> float:
        """The share that goes with these layers if each group keeps its least."""
        left = self.prices_left
        return 1 - (left.total - params_gone(self.groups, self.least_keep)) / self.prices.total

    @property
    def of_units(self) -> float:
        """The share of all parameters that the groups' units are."""
        return params_of(self.groups) / self.prices.total

    @property
    def reaches(self) -> bool:
        """Whether the widths can give the share; equal ones are the nearest to it."""
        room = self.step / 2 if self.is_uniform else 0
        to_remove = self.recipe.remove.share * self.prices.total
        most = self.largest * self.prices.total + room
        return not self.groups or bool(self.kept) or to_remove <= most

    def with_layers(self, layers: tuple[int, ...]) -> "Resolved":
        """Return the run with these layers. Raises RecipeError if widths cannot give the rest."""
        recipe, groups = self.recipe, groups_of(self.recipe, self.arch, layers)
        moved = replace(self, layers=layers, groups=groups)
        prices = moved.prices_left
        if self.kept:
            plan = plan_of(groups, prices, {key: keep.shape[-1] for key, keep in self.kept.items()})
            return replace(moved, plans=(plan,), removals=(plan.removed_share,))

        # What layers and tokens do not give is the widths' part, in equal rounds; it may be
        # nothing.
        remove = share_for_widths(moved)
        shares = round_shares(recipe.choose.rounds if remove > 0 else 1)
        plans = [plan_of(groups, prices, {group.key: group.num_units for group in groups})]
        if remove > 0:
            # Other budgets only count with this plan and spread it over layers in their own steps.
            align = self.align if self.is_uniform else 1
            plans = round_plans(
                groups, prices, uniform_plan(groups, prices, remove, align), shares, align
            )
        removals = tuple(remove * share for share in shares)
        rounds = {"rounds": len(shares)}
        return replace(
            moved, recipe=recipe.filled(choose=rounds), plans=tuple(plans), removals=removals
        )


def checked(opened: Opened) -> Opened:
    """Return `opened`, the recipe's `groups` filled in: what holds most of such a model.

    Raises ArchError or RecipeError for what this model cannot do.
    """
    if opened.recipe.remove.groups is None:
        names = {group.name for group in opened.arch.groups}
        most = next(
            (name for name in (EXPERTS, FFN, EXPERT_CHANNELS, SHARED) if name in names), FFN
        )
        opened = opened.filled(remove={"groups": (most,)})
    recipe, arch, config = opened.recipe, opened.arch, opened.model.config
    remove = recipe.remove
    groups = groups_of(recipe, arch, layers_to_expect(recipe, arch, config))
    check_experts(recipe, groups)
    if groups and (recipe.choose.budget != "uniform" or remove.protected_layers):
        why = "it is inside a larger class"
        if config.get_text_config() is config:
            why = why_not_per_layer(opened.model, arch, remove.group_names)
        if why is not None:
            raise RecipeError(
                f"choose.budget: {recipe.choose.budget} with protected_layers "
                f"{list(remove.protected_layers)} gives layers widths of their own, which a "
                f"language model of type {config.model_type} cannot be saved with ({why}); use "
                "budget uniform without protected_layers."
            )
    if remove.vocabulary == "auto" and remove.groups and "ffn" not in remove.groups:
        raise RecipeError(
            "remove.vocabulary: auto weighs tokens against FFN channels, which groups "
            f"{list(remove.groups)} do not have; say how many tokens stay, add ffn, or set "
            "vocabulary: null."
        )
    if not groups and remove.vocabulary == opened.model.get_input_embeddings().num_embeddings:
        raise RecipeError(
            f"remove.vocabulary: {remove.vocabulary:,} rows are all that the model has, so "
            "nothing would go; give fewer."
        )
    return share_of_size(opened)


def share_of_size(opened: Opened) -> Opened:
    """Return `opened`, the recipe's share from its `to`.

    share = (parameters - those that may stay) / parameters. Equal widths are the nearest to a
    share, so half of their step is added: the result is never larger than asked. Raises RecipeError
    for a size that is none, or less than a cut can leave, with the least that it can.
    """
    recipe, size = opened.recipe, opened.size
    remove = recipe.remove
    if remove.to is None:
        return opened
    if is_size(remove.to):
        stays = int(parse_size("remove.to", remove.to) * size.num_params / size.num_bytes)
    else:
        stays = parse_count(remove.to)
    if not 0 < stays < size.num_params:
        raise RecipeError(
            f"remove.to: {remove.to} leaves {stays:,} parameters, and the model has "
            f"{size.num_params:,} ({human_bytes(size.num_bytes)}); give a smaller model's size "
            "that is above 0."
        )
    plain = _of_share(opened, min(1 - stays / size.num_params, MOST_SHARE))
    run = _unplanned(plain)
    sized = plain
    if run.is_uniform and run.groups:
        share = (size.num_params - stays + run.step / 2) / size.num_params
        sized = _of_share(opened, min(share, MOST_SHARE), run.align)
    if remove.vocabulary is not None:  # it is not known yet what the tokens take
        return sized

    # Beyond the last step there is none; half a step beyond it is met.
    possible = nearest(sized)
    left = resolve(possible).plans[-1].cost_after
    if left > stays:
        num_bytes = left * size.num_bytes // size.num_params
        raise RecipeError(
            f"remove.to: {remove.to} is less than a cut can leave; the recipe's groups leave "
            f"{left:,} parameters ({num_bytes / 1e6:.4g} MB) at least; give that or more, lower "
            "align, or name more groups."
        )
    return possible


def _of_share(opened: Opened, share: float, align: int | None = None) -> Opened:
    """Return `opened` with this share in place of a size. `align`: None for the recipe's."""
    return opened.filled(
        remove={"to": None, "share": share, "align": align or opened.recipe.remove.align}
    )


def nearest(opened: Opened) -> Opened:
    """Return `opened` with the nearest share that layers, tokens and widths can give, its own if
    they can.
    """
    share, run = opened.recipe.remove.share, _unplanned(opened)
    if not run.largest:
        return opened
    # Where less goes, fewer layers go by default, and then the widths may give less.
    while share > (largest := math.floor(1e6 * run.largest) / 1e6) > 0:
        share, run = largest, _unplanned(_of_share(opened, largest))
    least = math.ceil(1e6 * (run.prices.taken(run.layers) or run.step) / run.prices.total) / 1e6
    return _of_share(opened, max(share, least))


def align_for(recipe: Recipe, groups: Groups, prices: Prices, gone: int) -> int:
    """Return the recipe's `align`, or the default for the widths that are left.

    `gone`: what layers and tokens take of the share.
    """
    units = params_of(groups)
    of_widths = recipe.remove.share * prices.total - gone
    return recipe.remove.align or default_align(groups, 1 - of_widths / units if units else 0.0)


def resolve(opened: Opened) -> Resolved:
    """Fill what depends on the model and make plans. Raises RecipeError for what is unreachable."""
    run = _unplanned(opened)
    recipe, prices = run.recipe, run.prices
    if not run.reaches:
        raise out_of_reach(
            recipe.remove.share, prices, min(run.largest, nearest(opened).recipe.remove.share)
        )
    if recipe.polish.num_tokens:
        check_training(recipe.polish, "polish")
    planned = run.with_layers(run.layers)
    return replace(planned, warnings=(*run.warnings, *_warnings(planned)))


def _unplanned(opened: Opened) -> Resolved:
    """Return the run in numbers, without its plans."""
    recipe, arch, config = opened.recipe, opened.arch, opened.model.config
    prices = prices_of(arch, opened.model)
    if opened.trim is not None:
        num_gone = opened.trim.kept.num_dense - opened.trim.kept.num_kept
        prices = replace(prices, tokens=token_prices(opened.model, num_gone))

    # What layers and tokens take, and the widths that are left.
    depth = depth_of(recipe, arch, config, prices)
    recipe = recipe.filled(
        remove={"depth": depth, "vocabulary": opened.vocabulary_left or recipe.remove.vocabulary}
    )
    layers = layers_to_expect(recipe, arch, config)
    groups = groups_of(recipe, arch, layers)
    align = align_for(recipe, groups, prices, prices.taken(layers))

    # Text for the widest reader that is fitted; a layer is folded into the FFN reader before it.
    text, widest = text_for(opened, groups + (arch.ffns if depth else ()))
    damping, warnings = damping_for(recipe, text["num_tokens"], widest)
    target_mix = target_mix_of(recipe, arch)
    polish = recipe.polish.num_tokens
    if polish is None:
        trains = bool(groups or depth) and recipe.repair.compensate == "least_squares"
        polish = text["num_tokens"] if trains else 0
    return Resolved(
        recipe=recipe.filled(
            remove={"align": align},
            repair={"damping": damping, "target_mix": target_mix},
            calibration=text,
            polish={"num_tokens": polish},
        ),
        align=align,
        depth=depth,
        **text,
        target_mix=target_mix,
        damping=damping,
        arch=arch,
        prices=prices,
        layers=layers,
        groups=groups,
        kept={} if opened.like is None else opened.like.keeps,
        warnings=warnings,
    )


def share_for_widths(run: Resolved) -> float:
    """Return the widths' share of what layers and tokens leave; 0 if that is less than half a step.

    Raises RecipeError if layers and tokens alone take more than half a step too much.
    """
    recipe, prices, depth, step = run.recipe, run.prices, run.depth, run.step
    num_gone = prices.taken(run.layers)
    if not run.groups:
        return 0.0
    to_remove = recipe.remove.share * prices.total
    if not num_gone:
        return recipe.remove.share
    if abs(to_remove - num_gone) <= step / 2:
        return 0.0
    if num_gone > to_remove and not depth:
        raise RecipeError(
            f"remove.vocabulary: the tokens that go are {num_gone / prices.total:.4f} of all "
            f"{prices.total_text}, more than remove: {recipe.remove.share:g}; keep more tokens, or "
            "remove at least that."
        )
    if num_gone > to_remove:
        per_layer = (num_gone - prices.tokens) // depth
        most = int((to_remove - prices.tokens + step / 2) // per_layer)
        least = math.ceil(1e4 * num_gone / prices.total) / 1e4
        raise RecipeError(
            f"remove.depth: {depth} layers of {per_layer:,} parameters each make it "
            f"{num_gone / prices.total:.3f} of all {prices.total_text}, more than remove: "
            f"{recipe.remove.share:g}; use depth {most} at most, or remove at least {least:.4f}."
        )
    return (to_remove - num_gone) / (prices.total - num_gone)


def free_layers(recipe: Recipe, arch: Arch) -> list[int]:
    """Return the dense layers that are not protected. Raises RecipeError for a protected one that
    is missing.
    """
    named = recipe.remove.protected_layers
    protected = _layers_named("remove.protected_layers", named, arch.num_layers)
    return [index for index in range(arch.num_layers) if index not in protected]


def removed_layers(recipe: Recipe, arch: Arch) -> set[int]:
    """Return the layers that the recipe names for removal. Raises RecipeError if they cannot go."""
    layers, depth = recipe.remove.layers, recipe.remove.depth
    named = _layers_named("remove.layers", layers, arch.num_layers)
    shown = ", ".join(map(str, layers))
    if len(named) < len(layers):
        raise RecipeError(
            f"remove.layers: [{shown}] names a layer of {arch.num_layers} twice; name each once."
        )
    if both := sorted(named.difference(free_layers(recipe, arch))):
        raise RecipeError(
            f"remove.layers: layer {both[0]} is in protected_layers too; take it out of one of "
            "them."
        )
    if named and depth not in (None, len(named)):
        raise RecipeError(
            f"remove.depth: {depth} is not the number of remove.layers: [{shown}]; "
            f"leave depth out, or give {len(named)}."
        )
    return named


def _layers_named(key: str, layers: tuple[int, ...], num_layers: int) -> set[int]:
    for index in layers:
        if not -num_layers <= index < num_layers:
            end = num_layers - 1
            raise RecipeError(
                f"{key}: there is no layer {index}; use 0 to {end}, or {-num_layers} to -1 from "
                "the end."
            )
    return {index % num_layers for index in layers}


def layers_to_expect(recipe: Recipe, arch: Arch, config: Any) -> tuple[int, ...]:
    """Return the layers that stay, by their dense numbers.

    If the recipe does not name those that go, the last unprotected ones do; an unknown `depth` is
    0. Raises RecipeError if so many cannot go, or if layers differ in size.
    """
    named, free = removed_layers(recipe, arch), free_layers(recipe, arch)
    if not free:
        raise RecipeError(
            "remove.protected_layers: no layer is left to remove anything from; protect fewer."
        )
    depth = len(named) or recipe.remove.depth or 0
    if depth and config.is_heterogeneous:
        raise RecipeError(
            f"remove.depth: {depth} layers cannot be removed from a model of per-layer widths "
            "(per_layer_config); remove layers from the dense model, before widths."
        )
    if depth and not arch.is_chain:
        raise RecipeError(
            f"remove.depth: layers of {arch.family} are given more than hidden states, so none can "
            "be removed; leave depth and layers out."
        )
    if depth >= len(free):
        raise RecipeError(
            f"remove.depth: {depth} of {arch.num_layers} layers cannot be removed; one that is not "
            f"in protected_layers must stay, so ask for 0 to {len(free) - 1}."
        )
    removed = named or free[len(free) - depth :]
    return tuple(index for index in range(arch.num_layers) if index not in removed)


def depth_of(recipe: Recipe, arch: Arch, config: Any, prices: Prices) -> int:
    """Return how many whole layers go: the recipe's number, or a default.

    The first units are cheap to remove and the last ones ruin the model. With f the share of the
    recipe's units that would go if widths gave all, round(LAYERS_PER_UNIT * (f - UNITS_ALONE)) of
    all layers go, or none. Measured on SmolLM2-135M (LOG, 2026-11-25): 0 of 30 layers at 30% of all
    parameters, 4 at 40%, 8 at 50%. 0 too if the recipe has rounds or cuts no FFN, and if layers
    differ.
    """
    remove, differ = recipe.remove, config.is_heterogeneous or not arch.is_chain
    if remove.depth is not None:
        return remove.depth
    if remove.layers:
        return len(remove.layers)
    groups = groups_of(recipe, arch, tuple(range(arch.num_layers)))
    plain = recipe.choose.rounds == 1 and "ffn" in remove.group_names
    alike = len(set(arch.params_per_layer)) == 1 and not any(
        group.kind in OF_EXPERTS for group in groups
    )
    if not plain or not alike or not groups or differ:
        return 0
    of_widths = remove.share * prices.total - prices.tokens
    units = params_of(groups)
    wanted = round(LAYERS_PER_UNIT * (of_widths / units - UNITS_ALONE) * arch.num_layers)
    num_free = len(free_layers(recipe, arch))
    return max(0, min(wanted, int(of_widths // prices.per_layer[0]), num_free - 1))


def groups_of(recipe: Recipe, arch: Arch, layers: tuple[int, ...]) -> Groups:
    """Return the groups that lose units if only `layers` are left, numbered as they are then."""
    free, chosen = free_layers(recipe, arch), arch.select(recipe.remove.group_names)
    return tuple(
        replace(group, layer=number)
        for number, layer in enumerate(layers)
        for group in chosen
        if group.layer == layer and layer in free
    )


def check_experts(recipe: Recipe, groups: Sequence[Group]) -> None:
    """Raise RecipeError for what experts do not support, or what only experts support."""
    choose, have_experts = recipe.choose, any(group.kind in OF_EXPERTS for group in groups)
    if have_experts and choose.domain_weighting in BY_DOMAIN:
        raise RecipeError(
            f"choose.domain_weighting: {choose.domain_weighting} looks at one reader's cut, "
            "which experts and their channels do not have; use energy or tokens, or leave experts "
            "out of groups."
        )
    if have_experts and choose.budget != "uniform":
        raise RecipeError(
            "remove.groups: experts and their channels can only go with budget: uniform, got "
            f"{choose.budget}; change it or leave experts out."
        )
    units = find_score(choose.score).units
    if have_experts and units == "channels and heads":
        raise RecipeError(
            f"choose.score: {choose.score} is of channels and heads, not of experts; "
            "use obs, or leave experts out of groups."
        )
    other = next((group.name for group in groups if group.kind != "experts"), None)
    if other and units == "experts":
        raise RecipeError(
            f"choose.score: {choose.score} is of whole experts, groups has {other} too; "
            "use obs, or groups: [experts]."
        )


def text_for(opened: Opened, groups: Groups) -> tuple[dict[str, Any], int]:
    """Return `num_tokens` and `sequence_length`, filled, and the widest reader's inputs."""
    calibration = opened.recipe.calibration
    widest = max((group.num_inputs for group in groups), default=1)
    num_tokens = calibration.num_tokens or max(
        MIN_DEFAULT_TOKENS, DEFAULT_TOKENS_PER_INPUT * widest
    )
    length = block_length(calibration.sequence_length, opened.model.config)
    return {"num_tokens": num_tokens, "sequence_length": length}, widest


def _warnings(run: Resolved) -> Iterator[str]:
    """Yield a warning per kind of unit of which less than `DEEP_KEEP` is left, and one if the run
    measures on installed text without any general prose.
    """
    num_keep = run.plans[-1].num_keep
    for name, members in by_name(run.groups).items():
        kept = sum(num_keep[group.key] for group in members) / sum(
            group.num_units for group in members
        )
        if kept < DEEP_KEEP:
            yield (
                f"{1 - kept:.0%} of all {name} units go, more than they can give without ruin; "
                "remove less, or spread it: preset best, more groups, depth."
            )
    if not any(
        d.installed in PROSE or not (d.installed or d.answers)
        for d in run.recipe.calibration.domains.values()
    ):
        yield (
            "calibration.domains: no general prose that people wrote, so text unlike these domains "
            "suffers most; give your own text or `general`, a mixture from the hub, or run pip "
            "install --no-deps exllamav3, whose calibration text is read as data."
        )


def target_mix_of(recipe: Recipe, arch: Arch) -> float:
    """Return the recipe's `target_mix`, filled. Raises RecipeError if the family cannot have it."""
    mix, refits = recipe.repair.target_mix, recipe.repair.compensate == "least_squares"
    if mix is None:
        return DEFAULT_TARGET_MIX if refits and arch.mlp_adds_directly else 0.0
    if mix > 0 and not arch.mlp_adds_directly:
        raise RecipeError(
            f"repair.target_mix: family {arch.family} normalises what an MLP gives before adding "
            f"it, so no drift can be made up for; got {mix:g}, set it to 0 or "
            "leave it out."
        )
    return mix if refits else 0.0


def damping_for(recipe: Recipe, num_tokens: int, widest: int) -> tuple[float, tuple[str, ...]]:
    """Return the recipe's `damping`, higher for few tokens, and then a warning."""
    repair, needed = recipe.repair, TOKENS_PER_INPUT * widest
    raised = Recipe().repair.damping * needed / num_tokens
    refits = repair.compensate == "least_squares"
    if not refits or num_tokens >= needed or repair.damping >= raised:
        return repair.damping, ()
    warning = (
        f"calibration.num_tokens: {num_tokens:,} tokens are few for least squares over {widest:,} "
        f"channels (want {needed:,}), so damping rises from {repair.damping:g} to "
        f"{raised:g}."
    )
    return raised, (warning,)
