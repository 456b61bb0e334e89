"""`prune`: a run, followed by recovery if the recipe asks for it."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.files import check_replaceable
from secateur.log import Progress, silent
from secateur.model.checkpoint import Tokenizer, load, open_checkpoint
from secateur.model.modules import CausalLM
from secateur.pruning.prune import prune_run
from secateur.pruning.result import Result
from secateur.ranks import is_first, joined, meet
from secateur.recipe import Recipe
from secateur.recipe_file import as_recipe
from secateur.recovery.recover import recover
from secateur.report.records import read_summary
from secateur.store import place_beside

__all__ = ["Result", "prune"]


@joined()
def prune(
    model: CausalLM | str | Path,
    recipe: Recipe | dict[str, Any] | Path | str | None = None,
    *,
    out: Path | str | None = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    resume: bool = False,
    command: str = "",
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> Result:
    """Prune a causal LM by a recipe; return it with what it cost and which units stayed.

    `model`: a local directory, a hub id, a `.gguf` file, `smollm2-135m`, or a model in memory. A
    model in memory needs `tokenizer` and is pruned in place. Its buffers that no checkpoint stores,
    such as rotary frequencies rounded by `.to(torch.bfloat16)`, are first computed anew; `warnings`
    in the summary say so.

    `recipe`: a Recipe, a mapping, a YAML file, or None for the defaults. `out`: the directory to
    write; it appears complete or not at all. `resume`: continue an interrupted run of the same
    inputs, whose steps are in a hidden directory beside `out`. `tell`: gets a line about that.
    `command`: how to repeat the run, for the model card.

    Under torchrun every process calls this and gets the same model; the first one writes and
    verifies. With the recipe's key `recover`, model and directory are the recovered ones, and the
    figures are those of pruning.

    Raises a SecateurError, one sentence, for what a user can correct.
    """
    progress = progress if is_first() else silent
    parsed = as_recipe(recipe)
    options = {"tokenizer": tokenizer, "resume": resume, "command": command, "progress": progress, "tell": tell}
    if parsed.recover is None:
        return prune_run(model, parsed, out=out, overwrite=overwrite, **options)
    if not isinstance(model, str | Path):
        raise RecipeError(
            "recover: needs the dense model as a directory or hub id, since a model in memory is pruned in place; give "
            "its path, or leave recover out of the recipe and call secateur.recover."
        )
    if out is None:
        raise RecipeError("recover: writes checkpoints on the way; say where the result goes with out.")
    return _prune_then_recover(model, parsed, Path(out), overwrite, options)


def _prune_then_recover(
    model: str | Path, recipe: Recipe, out: Path, overwrite: bool, options: dict[str, Any]
) -> Result:
    """Return the pruning's result with the recovered model in place of the pruned one.

    A hidden directory beside `out` has the pruned checkpoint meanwhile. It is removed unless the
    pruning was interrupted. An interrupted recovery resumes by itself, after pruning again.
    """
    place = out.absolute()
    check_replaceable(place, overwrite=overwrite, protected=open_checkpoint(model, weights=False).directory)
    folder = place.with_name(f".{place.name}.pruned")
    pruned, without = folder / "pruned", recipe.model_copy(update={"recover": None})
    try:
        # overwrite: a killed run may have left it.
        result = prune_run(model, without, out=pruned, overwrite=True, **options)
        meet("pruned")  # the first rank is still saving
        assert recipe.recover is not None
        changes = {"recover": recipe.recover.model_dump(mode="json")}
        settings = {"command": options["command"], "progress": options["progress"], "name": f"{model}, pruned"}
        recover(pruned, model, changes, out=place, overwrite=overwrite, **settings)
    finally:
        if is_first() and not place_beside(pruned).exists():
            shutil.rmtree(folder, ignore_errors=True)
    return dataclasses.replace(result, model=load(place), recipe=recipe, summary=read_summary(place), out=out)
