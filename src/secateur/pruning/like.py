"""Layers and units that stay in a result (`keep.json`), and what a run takes from another one
(`--like`).

In: the directory, changes to its recipe, and the model. Out: the recipe; the model with what stays.
Layers that went are named by the first entry of the file, group `layers`: those that stayed, by
their dense numbers. The other entries number layers as the result does: n is the n-th of these.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CheckpointError, RecipeError
from secateur.files import json_of, sha256_of
from secateur.methods.budget import token_prices
from secateur.model.bind import text_config
from secateur.model.checkpoint import open_checkpoint, planned_model
from secateur.model.group import GroupKey, Keeps
from secateur.model.identity import lineage
from secateur.model.stock import CausalLM
from secateur.pruning.open import Like, Opened
from secateur.pruning.resolve import groups_of
from secateur.recipe import RECIPE_FILE, Keys, Recipe, load_recipe, parse_recipe, recipe_over
from secateur.report.records import Summary, read_summary
from secateur.vocabulary.kept import kept_tokens_of

KEEP_FILE = "keep.json"


def write_keeps(directory: Path, layers: Sequence[int], keeps: Mapping[GroupKey, Tensor]) -> None:
    """Write the file. `layers`: those that stayed; empty if all did."""
    entries = [{"group": "layers", "keep": layers}] if layers else []
    units = [
        {"layer": layer, "group": group, "keep": keep.tolist()}
        for (layer, group), keep in keeps.items()
    ]
    (directory / KEEP_FILE).write_text(json.dumps([*entries, *units]) + "\n", encoding="utf-8")


def read_keeps(directory: Path, num_layers: int) -> tuple[tuple[int, ...], Keeps]:
    """Return the dense layers that stayed, and the units of each group. `num_layers`: of the dense
    model.

    Raises CheckpointError for a missing or damaged file.
    """
    layers, keeps = tuple(range(num_layers)), Keeps()
    try:
        for entry in json_of((directory / KEEP_FILE).read_text(encoding="utf-8")):
            keep = torch.tensor(entry["keep"])
            ascends = bool((keep >= 0).all() and (keep.diff() > 0).all())
            if keep.dtype != torch.long or not keep.numel() or not ascends:
                raise ValueError
            if entry["group"] == "layers":
                layers = tuple(keep.tolist())
            else:
                keeps[int(entry["layer"]), str(entry["group"])] = keep
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        raise bad_keeps(directory) from None
    return layers, keeps


def bad_keeps(directory: Path) -> CheckpointError:
    """Return the error for a file that names no units of the model."""
    return CheckpointError(
        f"{directory / KEEP_FILE}: does not name units that stay; use the file that secateur prune "
        "wrote."
    )


def recipe_like(directory: Path, changes: Recipe) -> Recipe:
    """Return a result's recipe, with those keys of `changes` that were given.

    Raises CheckpointError if the directory holds no result, RecipeError for a key by which other
    units would go.
    """
    read_summary(directory)
    base = load_recipe(directory / RECIPE_FILE)
    base.pop("recover", None)  # of a result that was recovered
    recipe = parse_recipe(base, f"recipe {directory / RECIPE_FILE}")
    for group in ("remove", "choose"):
        mine, there = getattr(changes, group), getattr(recipe, group)
        for key in sorted(mine.model_fields_set):
            if (got := getattr(mine, key)) != (has := getattr(there, key)):
                raise RecipeError(
                    f"{group}.{key}: is {has} in the run that like {directory} repeats, got {got}; "
                    "leave it out, as that run has chosen which units go."
                )
    return recipe_over(base, changes, but={"remove", "choose"})


def opened_like(opened: Opened, directory: Path) -> Opened:
    """Return the model with another result's units as those that stay, all others to go in one
    round.

    Its recipe names the layers that go, and goes in one round.
    Raises CheckpointError for a damaged result, or if the model that it was pruned from was of
    another shape: which number differs first.
    """
    checkpoint, summary = open_checkpoint(directory, weights=False), read_summary(directory)
    layers, keeps = read_keeps(directory, summary.num_layers[0])
    other = planned_model(checkpoint)
    _check_shape(opened, other, summary, directory)
    removed = [layer for layer in range(summary.num_layers[0]) if layer not in layers]
    remove: Keys = {"layers": tuple(removed), "depth": len(removed)}
    recipe = opened.recipe.filled(remove=remove, choose={"rounds": 1})
    groups = {group.key: group for group in groups_of(recipe, opened.arch, layers)}
    if groups.keys() != keeps.keys():
        raise bad_keeps(directory)
    for key, keep in keeps.items():
        if keep.max() >= groups[key].num_units or (
            keep.ndim > 1 and groups[key].kind != "expert_channels"
        ):
            raise bad_keeps(directory)
    tokens, source = kept_tokens_of(directory), lineage(checkpoint, other.num_parameters())[-1]
    like = Like(checkpoint, source, sha256_of(directory / KEEP_FILE), keeps, tokens)
    return replace(opened, recipe=recipe, like=like)


def _check_shape(opened: Opened, other: CausalLM, summary: Summary, directory: Path) -> None:
    """Raise CheckpointError if the model is not shaped as the one that `summary` tells of."""
    tokens, models = kept_tokens_of(directory), (opened.model, other)
    embeddings: list[Any] = [model.get_input_embeddings() for model in models]
    rows = [
        embeddings[0].num_embeddings,
        embeddings[1].num_embeddings if tokens is None else tokens.num_dense,
    ]
    # Siblings may have more tokens than were there when none of these went.
    sizes = zip((opened.size, summary.dense_size), models, rows, strict=True)
    own, dense = (size.num_params - token_prices(model, count) for size, model, count in sizes)
    units = {group.name: group.num_units for group in reversed(opened.arch.groups)}
    numbers = [
        ("family", opened.arch.family, summary.family),
        ("number of layers", opened.arch.num_layers, summary.num_layers[0]),
        ("hidden size", *(text_config(model).hidden_size for model in models)),
        *(
            (f"number of {name} units in a layer", units.get(name, 0), was)
            for name, (was, _, _) in summary.widths.items()
        ),
        *([] if tokens is None else [("number of tokens", *rows)]),
        ("number of parameters without those of tokens", own, dense),
    ]
    for what, got, wanted in numbers:
        if got != wanted:
            raise CheckpointError(
                f"like {directory}: the {what} of {opened.name} is {got}, and of the model that "
                f"was pruned there {wanted}; give a model of that shape, or leave like out to "
                "choose units anew."
            )
