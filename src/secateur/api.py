"""`prune`: a run. `recover`: a training of its result."""

from collections.abc import Sequence
from pathlib import Path

from secateur.errors import RecipeError
from secateur.log import Progress, Tell, mute, silent
from secateur.model.stock import CausalLM, Tokenizer
from secateur.pruning.prune import prune_run
from secateur.pruning.result import Result
from secateur.ranks import joined
from secateur.recipe import AnyRecipe, RecoverySettings, Remove, as_recipe
from secateur.recovery import recover as recovery
from secateur.report.records import RecoveryRecord
from secateur.report.report import write_pages, write_recovered_pages

__all__ = ["Result", "prune", "prune_sizes", "recover"]


@joined()
def prune(
    model: CausalLM | str | Path,
    recipe: AnyRecipe = None,
    *,
    out: Path | str | None = None,
    like: Path | str | None = None,
    from_: Path | str | None = None,
    max_loss: float | None = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    force: bool = False,
    command: str = "",
    progress: Progress = silent,
    tell: Tell = mute,
) -> Result:
    """Prune a causal LM by a recipe; return it with what it cost and which units stayed.

    `model`: a local directory, a hub id, a `.gguf` file, `smollm2-135m`, or a model in memory. A
    model in memory needs `tokenizer` and is pruned in place. Its buffers that no checkpoint stores,
    such as rotary frequencies rounded by `.to(torch.bfloat16)`, are first computed anew; `warnings`
    in the summary say so.

    `recipe`: a Recipe, a mapping, a YAML file, or None for the defaults. `out`: the directory to
    write; it appears complete or not at all. `like`: a result whose units go here too, for a
    sibling of the model that was pruned there: its recipe holds, with the keys that `recipe` gives
    on top, and what stays is repaired and polished on this model. `from_`: what `measure` wrote for
    this model: its recipe holds, with the keys that `recipe` gives on top, and its curves plan
    widths by layer. `max_loss`: in place of a size, the nats per token of held-out text that the
    result may lose, after all; as much goes as that allows, by at most three cuts. An interrupted
    run of the same inputs, whose steps are in a hidden directory beside `out`, is continued.
    `tell`: gets a line about that, and one about what the run will do and how long it takes.
    `force`: write a trim of the vocabulary, too, that costs more than 0.5 nats per token or twice
    what was foretold. `command`: how to repeat the run, for the model card, which shows it as it
    is.

    Under torchrun every process calls this and gets the same model; the first one writes and
    verifies.

    Raises a SecateurError, one sentence, for what a user can correct.
    """
    parsed = as_recipe(recipe)
    if parsed.recover is not None:
        raise RecipeError(
            "recover: is what secateur recover reads, once a model is pruned; leave it out of a "
            "prune."
        )
    (result,) = prune_run(
        model,
        parsed,
        finish=write_pages,
        out=out,
        like=like,
        from_=from_,
        max_loss=max_loss,
        tokenizer=tokenizer,
        overwrite=overwrite,
        force=force,
        command=command,
        progress=progress,
        tell=tell,
    )
    return result


@joined()
def prune_sizes(
    model: CausalLM | str | Path,
    recipe: AnyRecipe,
    sizes: Sequence[float | str],
    *,
    out: Path | str | None = None,
    from_: Path | str | None = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: Progress = silent,
    tell: Tell = mute,
) -> list[Result]:
    """Prune a causal LM to several sizes in one walk over its layers; each is what a run of its own
    would give.

    `sizes`: each as a recipe's `remove.share` (0.2), or its `to` ("100M"). `out`: has a directory
    for each, named 20 or 100M. All else as for `prune`; a copy of the weights is in memory for each
    size.

    Returns the results in the order of `sizes`.

    Raises a SecateurError, one sentence, for what a user can correct.
    """
    keys = [Remove(to=size) if isinstance(size, str) else Remove(share=size) for size in sizes]
    named = {
        size_key.to or f"{100 * size_key.share:.4g}": size_key.model_dump(exclude_unset=True)
        for size_key in keys
    }
    return prune_run(
        model,
        as_recipe(recipe),
        finish=write_pages,
        from_=from_,
        sizes=named,
        out=out,
        tokenizer=tokenizer,
        overwrite=overwrite,
        command=command,
        progress=progress,
        tell=tell,
    )


@joined()
def recover(
    pruned: str | Path,
    teacher: str | Path,
    recipe: AnyRecipe = None,
    *,
    out: str | Path,
    tokens: int | None = None,
    overwrite: bool = False,
    other_dense: bool = False,
    command: str = "",
    progress: Progress = silent,
    tell: Tell = mute,
) -> RecoveryRecord | None:
    """Train `pruned` to win back what pruning took from the dense `teacher`; write it to `out`.

    `recipe`: the keys given here go over the recipe.yaml of `pruned`. Its key `recover` says how to
    train, and on how many tokens. `tokens`: to train on, all domains together. `overwrite`: replace
    `out` if it is a result. `other_dense`: the teacher is meant to be another model than `pruned`
    was pruned from. `command`: how to repeat the run, for the model card. `progress`: called with
    (stage, done, total). `tell`: gets lines of text, at every evaluation and of interrupted runs.

    Returns the `RecoveryRecord` that recovery.json holds. The result is never worse: if what
    the training minimises did not fall on held-out text, the old weights are written, and a note
    says so.
    Under torchrun or `accelerate launch` every process calls this; the first one writes, the others
    return None.

    Raises a SecateurError, one sentence, for everything that a user can correct: RecipeError for
    the recipe and for missing packages, CheckpointError for models that do not fit each other.
    """
    changes = as_recipe(recipe)
    if tokens is not None:
        settings = (changes.recover or RecoverySettings()).model_copy(update={"num_tokens": tokens})
        changes = changes.model_copy(update={"recover": settings})
    return recovery.recover(
        pruned,
        teacher,
        changes,
        out=out,
        finish=write_recovered_pages,
        overwrite=overwrite,
        other_dense=other_dense,
        command=command,
        progress=progress,
        tell=tell,
    )
