"""`prune` is one run: open, plan, text, load, cut, polish, save, verify, result, page.

All that can be checked without weights is checked before a weight is read.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from secateur.evaluation.recover import recover
from secateur.formats.save import Verification, prove_reload, save_checkpoint
from secateur.log import Progress, Tell, mute, silent
from secateur.model.stock import CausalLM, Tokenizer
from secateur.pruning.cut import Cut, cut_and_polish
from secateur.pruning.like import opened_like, recipe_like, write_keeps
from secateur.pruning.open import Opened, open_model, tokenizer_of
from secateur.pruning.prepare import Prepared, begun_run, judged, judged_dense, prepared
from secateur.pruning.result import Result, summary_of
from secateur.pruning.sizes import (
    MeasuredSizes,
    Sizes,
    check_asked,
    cut_within,
    largest_of,
    of_sizes,
    with_most,
)
from secateur.pruning.text import completed
from secateur.ranks import joined
from secateur.recipe import AnyRecipe, Recipe, as_recipe, write_recipe
from secateur.report.report import write_pages

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
    (result,) = _results(
        model,
        as_recipe(recipe),
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
    keys = [
        as_recipe({"remove": {"to" if isinstance(size, str) else "share": size}}).remove
        for size in sizes
    ]
    named = {
        size_key.to or f"{100 * size_key.share:.4g}": size_key.model_dump(exclude_unset=True)
        for size_key in keys
    }
    return _results(
        model,
        as_recipe(recipe),
        from_=from_,
        sizes=named,
        out=out,
        tokenizer=tokenizer,
        overwrite=overwrite,
        command=command,
        progress=progress,
        tell=tell,
    )


def _results(
    model: CausalLM | str | Path,
    given: Recipe,
    *,
    out: Path | str | None,
    like: Path | str | None = None,
    tokenizer: Tokenizer | None,
    overwrite: bool,
    force: bool = False,
    command: str,
    progress: Progress,
    tell: Tell,
    from_: Path | str | None,
    sizes: Sizes | None = None,
    max_loss: float | None = None,
) -> list[Result]:
    """Prune a causal LM, without the recipe's `recover`. Arguments, errors: see `prune`.

    `sizes`: each goes into a directory of its name below `out`.
    """
    # The recipe, with those of other directories below it, and the model.
    check_asked(given, like, from_, max_loss)
    recipe = given if like is None else recipe_like(Path(like), given)
    measured = None if from_ is None else MeasuredSizes.of(Path(from_))
    recipe = recipe if measured is None else measured.recipe_with(recipe)
    opened = open_model(model, recipe, tokenizer, out=out)
    if measured is not None:
        measured.check_model(opened)
    opened = completed(opened if like is None else opened_like(opened, Path(like)))

    # What goes at most, and on how many copies.
    base, is_alone = opened, sizes is None and max_loss is None
    num_models = num_results = len(sizes or "1")
    if sizes is not None:
        opened = largest_of(opened, sizes)
    elif max_loss is not None:
        # The model as it is, the best cut so far, and the one that is cut.
        opened, num_models = with_most(opened, given, "max_loss"), 3

    # Sizes that are finished serve another run with other ones beside them.
    with begun_run(base, out, overwrite=overwrite, progress=progress, tell=tell) as services:
        if is_alone and services.scratch is not None:
            services.log.append_to(services.scratch)
        does = "removes" if is_alone else "removes up to"
        if measured is not None:
            services.store.before = measured.steps(services.progress)
        ready = prepared(
            opened, services, does=does, num_models=num_models, num_results=num_results
        )
        if measured is not None:
            ready = ready._replace(run=measured.served(ready.run))
        if measured or max_loss:
            services.store.check_input(
                "limit or measurement", f"{max_loss} {measured and measured.digest}"
            )
        members = {"": ready} if sizes is None else of_sizes(ready, base.recipe, sizes)
        cuts = cut_and_polish(ready.run, [member.run for member in members.values()], force=force)
        pairs = zip(members.values(), cuts, strict=True)
        if max_loss is not None:
            pairs = cut_within(ready, measured, max_loss)
        return list(_pruned(ready, zip(members, pairs, strict=True), command, out))


def _pruned(
    ready: Prepared,
    cuts: Iterable[tuple[str, tuple[Prepared, Cut]]],
    command: str,
    out: Path | str | None,
) -> Iterator[Result]:
    """Yield the result of each cut, once it is judged and written to its run's directory, if there
    is one.

    `cuts`: the name of each size, what it was cut from, and the cut. `out`: where all go.
    """
    services, judge, dense = ready.run.services, None, None
    if ready.run.resolved.recipe.output.evaluate:
        judge, dense = judged_dense(ready)
    for name, (member, cut) in cuts:
        opened, run, directory = member.opened, cut.run, cut.run.services.scratch

        # Judge it, then write it.
        pruned = None if judge is None else judged(run, f"pruned {name}".strip(), judge.pruned)
        services.store.note_found()
        member.placement.offload()
        proof = None if directory is None else _saved(opened, cut, directory)
        summary = summary_of(member, cut, proof, dense=dense, pruned=pruned, command=command)
        if directory is not None:
            run.services.log.write({"event": "seconds", **summary.seconds})
            summary = write_pages(directory, summary, run.resolved.recipe)
        yield Result(
            run.model,
            tokenizer_of(opened),
            run.resolved.recipe,
            cut.keeps,
            run.resolved.layers,
            summary,
            None if out is None else Path(out) / name,
        )


def _saved(opened: Opened, cut: Cut, directory: Path) -> Verification:
    """Write the model, its recipe and which units stay; have a fresh process compute the same
    logits.
    """
    run, services = cut.run, cut.run.services
    resolved = run.resolved
    with services.log.time("save"):
        left_behind = save_checkpoint(
            run.model,
            tokenizer_of(opened),
            directory,
            kept=opened.trim and opened.trim.kept,
            carry_from=opened.directory,
        )
        write_recipe(directory, resolved.recipe)
        write_keeps(directory, resolved.layers if resolved.depth else (), cut.keeps)
        for sentence in left_behind:
            services.log.note(sentence)
    with services.log.time("verify"):
        return prove_reload(
            run.model, directory, run.text.domains[0].held_out.ids_NT, services.progress
        )
