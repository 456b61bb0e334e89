"""Prune, then recover: what a recipe with the key `recover` asks for.

In: the function that prunes and its arguments. Out: its result with the recovered model in the pruned one's place. The
pruned checkpoint lies in a hidden directory beside OUT meanwhile and is gone afterwards.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.checkpoint import load, open_checkpoint
from secateur.errors import RecipeError
from secateur.output import check_replaceable
from secateur.progress import Progress
from secateur.ranks import from_first, is_first
from secateur.ranks_group import meet
from secateur.recipe import Recipe
from secateur.recovering import recover


def prune_then_recover(
    prune: Callable[..., Any],
    model: PreTrainedModel | str | Path,
    recipe: Recipe,
    out: Path | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    command: str,
    progress: Progress,
) -> Any:
    """Return what `prune` returns, its model and directory those of the recovery; its figures are of the pruning.

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
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.pruned-") if is_first() else None
    with folder or nullcontext(""):
        pruned = from_first(lambda: Path(folder.name if folder else "", "pruned"))
        without = recipe.model_copy(update={"recover": None})
        result = prune(model, without, out=pruned, tokenizer=tokenizer, command=command, progress=progress)
        meet("pruned")  # the first rank is still saving
        assert recipe.recover is not None
        changes = {"recover": recipe.recover.model_dump(mode="json")}
        settings = {"overwrite": overwrite, "command": command, "progress": progress, "name": f"{model}, pruned"}
        recover(pruned, model, changes, out=place, **settings)
    return dataclasses.replace(result, model=load(place), recipe=recipe, out=Path(out))
