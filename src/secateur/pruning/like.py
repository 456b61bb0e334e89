"""What a run takes from another result (`--like`): its recipe, and which units stay.

In: the directory, changes to its recipe, and the model. Out: the recipe; the model with what stays.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, RecipeError
from secateur.files import sha256_of
from secateur.methods.budget import token_prices
from secateur.model.bind import text_config
from secateur.model.checkpoint import open_checkpoint, planned_model
from secateur.model.identity import lineage
from secateur.model.kept import KEEP_FILE, bad_keeps, kept_tokens_of, read_keeps
from secateur.model.stock import CausalLM
from secateur.pruning.open import Like, Opened
from secateur.pruning.resolve import groups_of
from secateur.recipe import RECIPE_FILE, Keys, Recipe, load_recipe, parse_recipe, recipe_over
from secateur.report.records import Summary, read_summary


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
                    f"{group}.{key}: is {has} in the run that like {directory} repeats, got {got}; leave it out, "
                    "as that run has chosen which units go."
                )
    return recipe_over(base, changes, but={"remove", "choose"})


def opened_like(opened: Opened, directory: Path) -> Opened:
    """Return the model with another result's units as those that stay, all others to go in one round.

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
        if keep.max() >= groups[key].num_units or (keep.ndim > 1 and groups[key].kind != "expert_channels"):
            raise bad_keeps(directory)
    tokens, source = kept_tokens_of(directory), lineage(checkpoint, other.num_parameters())[-1]
    like = Like(checkpoint, source, sha256_of(directory / KEEP_FILE), keeps, tokens)
    return replace(opened.asking(recipe), like=like)


def _check_shape(opened: Opened, other: CausalLM, summary: Summary, directory: Path) -> None:
    """Raise CheckpointError if the model is not shaped as the one that `summary` tells of."""
    tokens, models = kept_tokens_of(directory), (opened.model, other)
    embeddings: list[Any] = [model.get_input_embeddings() for model in models]
    rows = [embeddings[0].num_embeddings, embeddings[1].num_embeddings if tokens is None else tokens.num_dense]
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
                f"like {directory}: the {what} of {opened.name} is {got}, and of the model that was pruned there "
                f"{wanted}; give a model of that shape, or leave like out to choose units anew."
            )
