"""Prune, then recover: what a recipe with the key `recover` asks for.

In: the function that prunes and its arguments. Out: its result with the recovered model in the pruned one's place. The
pruned checkpoint lies in a hidden directory beside OUT meanwhile and is gone afterwards, unless the pruning was
interrupted and can be resumed. An interrupted recovery goes on by itself, but is pruned for anew.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.checkpoint import load, open_checkpoint
from secateur.errors import RecipeError
from secateur.progress import Progress
from secateur.ranks import is_first
from secateur.ranks_group import meet
from secateur.recipe import Recipe
from secateur.recovering import recover
from secateur.staged_directory import check_replaceable
from secateur.store import place_beside


def prune_then_recover(
    prune: Callable[..., Any],
    model: PreTrainedModel | str | Path,
    recipe: Recipe,
    out: Path | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    command: str,
    progress: Progress,
    options: dict[str, Any],
) -> Any:
    """Return what `prune` returns, its model and directory those of the recovery; its figures are of the pruning.

    `options`: more for `prune`.

    Raises RecipeError where there is no dense model on disk to learn from, or nowhere to write.
    """
    if not isinstance(model, str | Path):
        raise RecipeError(
            "recover: needs the dense model as a directory or hub id, since a model in memory is pruned in place; give "
            "its path, or leave recover out of the recipe and call secateur.recover."
        )
    if out is None:
        raise RecipeError("recover: writes checkpoints on the way; say where the result goes with out.")
    place = Path(out).absolute()
    check_replaceable(place, overwrite=overwrite, protected=open_checkpoint(model, weights=False).directory)
    folder = place.with_name(f".{place.name}.pruned")
    pruned = folder / "pruned"
    without = recipe.model_copy(update={"recover": None})
    try:
        places = {"out": pruned, "overwrite": True}  # a killed run may have left it
        result = prune(model, without, **places, tokenizer=tokenizer, command=command, progress=progress, **options)
        meet("pruned")  # the first rank is still saving
        assert recipe.recover is not None
        changes = {"recover": recipe.recover.model_dump(mode="json")}
        settings = {"overwrite": overwrite, "command": command, "progress": progress, "name": f"{model}, pruned"}
        recover(pruned, model, changes, out=place, **settings)
    finally:
        if is_first() and not place_beside(pruned).exists():
            shutil.rmtree(folder, ignore_errors=True)
    return dataclasses.replace(result, model=load(place), recipe=recipe, out=Path(out))
