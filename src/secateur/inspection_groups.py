"""What a model could lose, whatever a recipe asks for: its family's groups, and why it has no others.

In: a bound architecture, what a run leaves of some groups. Out: facts for `inspect`. Arithmetic alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.arch import Arch, Group
from secateur.arch_experts import EXPERTS
from secateur.arch_numbers import head_width, text_config
from secateur.budget import GroupKey
from secateur.gguf_rules import gguf_problem
from secateur.recipe import Recipe
from secateur.serving import KV_HEADS, QUERY_HEADS, VLLM, Serving, check_server, check_vllm


@dataclass(frozen=True, slots=True)
class Possible:
    """One group of the family. `num_units` of the first layer that has it; `num_params` in all layers."""

    name: str
    unit: str
    num_layers: int
    num_units: int
    num_params: int


def possible_groups(arch: Arch) -> tuple[Possible, ...]:
    """Return every group that the family can lose units of. Some cut the same tensors, see `Arch.select`."""
    by_name: dict[str, list[Group]] = {}
    for group in arch.groups:
        by_name.setdefault(group.name, []).append(group)
    return tuple(
        Possible(
            name,
            members[0].unit,
            len(members),
            members[0].num_units,
            sum(group.num_units * group.params_per_unit for group in members),
        )
        for name, members in by_name.items()
    )


def groups_to_inspect(recipe: Recipe, arch: Arch) -> tuple[Recipe, tuple[str, ...]]:
    """Return the recipe and a note: where it names no groups and the model has experts, they are what is looked at.

    In such models the default group is in few layers or none.
    """
    names = {group.name for group in arch.groups}
    if "groups" in recipe.model_fields_set or EXPERTS not in names:
        return recipe, ()
    note = (
        f"groups: this recipe names none; {EXPERTS} are looked at here, as they hold most of the model. A run needs "
        f"groups: [{EXPERTS}] in its recipe."
    )
    return recipe.model_copy(update={"groups": (EXPERTS,)}), (note,)


def serving_after(server: str, num_gpus: int, arch: Arch, model: Any, num_keep: Mapping[GroupKey, int]) -> Serving:
    """Return whether a server could load the model once each group has lost what `num_keep` says.

    Raises RecipeError if the server is unknown or cannot use so many GPUs.
    """
    check_server(server, num_gpus)
    config: Any = text_config(model)
    heads_cut = any(
        name in ("kv_heads", "query_heads") and kept < group.num_units
        for group in arch.groups
        for (layer, name), kept in num_keep.items()
        if (group.layer, group.name) == (layer, name)
    )
    follows = not heads_cut and head_width(config) * config.num_attention_heads == config.hidden_size
    widths: dict[str, set[int]] = {QUERY_HEADS: {config.num_attention_heads}}
    if hasattr(config, KV_HEADS):
        widths[KV_HEADS] = {config.num_key_value_heads}
    for group in arch.groups:
        kept = num_keep.get((group.layer, group.name), group.num_units)
        if group.name == "query_heads":
            if heads_cut and kept < group.num_units:
                widths[QUERY_HEADS] = {kept * config.num_key_value_heads}
        elif group.name == "kv_heads":
            if kept < group.num_units:
                queries = config.num_attention_heads // config.num_key_value_heads
                widths |= {QUERY_HEADS: {kept * queries}, KV_HEADS: {kept}}
        else:
            widths.setdefault(group.config_key, set()).add(kept)
    frozen = {key: frozenset(values) for key, values in widths.items()}
    if server == VLLM:
        return check_vllm(num_gpus, arch.family, frozen, heads_follow_hidden_size=follows)
    problem = gguf_problem(model.config, frozen, head_width(config))
    return Serving(
        server, num_gpus, (problem,) if problem else (), ("llama.cpp was not run; secateur export writes the file",)
    )
