"""What a model could lose, whatever a recipe asks for: its family's groups, and why it has no others.

In: a bound architecture, what a run leaves of some groups. Out: facts for `inspect`. Arithmetic alone.
"""

from typing import Any

from secateur.arch import Arch, Group
from secateur.arch_experts import EXPERTS
from secateur.arch_numbers import head_width, text_config
from secateur.budget import Plan
from secateur.gguf_rules import gguf_problem
from secateur.inspect_record import Possible, Serving
from secateur.modeling_per_layer import is_per_layer
from secateur.recipe import Recipe
from secateur.serving import KV_HEADS, QUERY_HEADS, VLLM, check_server, check_vllm


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


def serving_after(server: str, num_gpus: int, arch: Arch, model: Any, plan: Plan) -> Serving:
    """Return whether a server could load the model once each group has lost what the plan says.

    Raises RecipeError if the server is unknown or cannot use so many GPUs.
    """
    check_server(server, num_gpus)
    config: Any = text_config(model)
    layers = config.per_layer_config if is_per_layer(config) else [config] * arch.num_layers
    found = [_widths_after(arch, index, sizes, plan) for index, sizes in enumerate(layers)]
    widths = {key: frozenset(each[key] for each in found if key in each) for each in found for key in each}
    follows = widths[QUERY_HEADS] == {config.hidden_size // head_width(config)}
    if server == VLLM:
        return Serving(server, num_gpus, *check_vllm(num_gpus, arch.family, widths, heads_follow_hidden_size=follows))
    problem = gguf_problem(model.config, widths, head_width(config))
    return Serving(
        server, num_gpus, (problem,) if problem else (), ("llama.cpp was not run; secateur export writes the file",)
    )


def _widths_after(arch: Arch, index: int, sizes: Any, plan: Plan) -> dict[str, int]:
    """Return one layer's widths, by config key. `sizes`: the layer's config before the run."""
    widths = {key: getattr(sizes, key) for key in (QUERY_HEADS, KV_HEADS) if hasattr(sizes, key)}
    for group in (group for group in arch.groups if group.layer == index):
        kept = plan.num_keep.get((index, group.name), group.num_units)
        if group.name == "query_heads":
            if kept < group.num_units:
                widths[QUERY_HEADS] = kept * widths[KV_HEADS]
        elif group.name == "kv_heads":
            if kept < group.num_units:
                queries = widths[QUERY_HEADS] // widths[KV_HEADS]
                widths |= {QUERY_HEADS: kept * queries, KV_HEADS: kept}
        else:
            widths[group.config_key] = kept
    return widths
