"""One prune: open, plan, text, load, cut, polish, save, verify, result, report.

All that can be checked without weights is checked before a weight is read.
`api` hands in what writes card and page.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from secateur.errors import RecipeError
from secateur.formats.save import Verification, prove_reload, save_checkpoint
from secateur.log import Progress, Tell
from secateur.model.stock import CausalLM, Tokenizer, eval_mode
from secateur.pruning.cut import Cut, cut_and_polish
from secateur.pruning.like import opened_like, recipe_like, write_keeps
from secateur.pruning.open import Opened, open_model, tokenizer_of
from secateur.pruning.prepare import Prepared, begun_run, judge_of, judged, judged_dense, prepared
from secateur.pruning.resolve import checked
from secateur.pruning.result import Result, summary_of
from secateur.pruning.sizes import MeasuredSizes, Sizes, cut_within, largest_of, of_sizes, with_most
from secateur.pruning.text import with_share_of_answers
from secateur.recipe import RECIPE_FILE, Recipe, dump_recipe
from secateur.report.records import Summary

# Writes card, result.json and page into the run's directory; returns the summary as it was written.
Finish = Callable[[Path, Summary, Recipe], Summary]


def prune_run(
    model: CausalLM | str | Path,
    recipe: Recipe,
    *,
    finish: Finish,
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
    """Prune a causal LM, without the recipe's `recover`. Arguments, errors: see `api.prune`.

    `finish`: writes what people read of a finished run. `sizes`: each goes into a directory of its
    name below `out`.
    """
    if max_loss is not None and not 0 < max_loss < math.inf:
        raise RecipeError(f"max_loss: give a number of nats per token above 0, got {max_loss}.")
    for name, other in (("max_loss", max_loss), ("from", from_)):
        if like is not None and other is not None:
            raise RecipeError(
                f"{name}: does not go with like, which says what goes; leave out one of them."
            )

    # The recipe, with those of other directories below it, and the model.
    given = recipe
    recipe = recipe if like is None else recipe_like(Path(like), recipe)
    measured = None if from_ is None else MeasuredSizes.of(Path(from_))
    recipe = recipe if measured is None else measured.recipe_with(recipe)
    opened = open_model(model, recipe, tokenizer)
    if measured is not None:
        measured.check_model(opened)
    opened = with_share_of_answers(
        checked(opened if like is None else opened_like(opened, Path(like)))
    )

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
        with eval_mode(ready.run.model):
            members = {"": ready} if sizes is None else of_sizes(ready, base.recipe, sizes)
            cuts = cut_and_polish(
                ready.run, [member.run for member in members.values()], force=force
            )
            pairs = zip(members.values(), cuts, strict=True)
            if max_loss is not None:
                pairs = cut_within(ready, measured, max_loss)
            results = list(_pruned(ready, zip(members, pairs, strict=True), command, finish))
    return [
        replace(result, out=out and Path(out) / name)
        for name, result in zip(members, results, strict=True)
    ]


def _pruned(
    ready: Prepared, cuts: Iterable[tuple[str, tuple[Prepared, Cut]]], command: str, finish: Finish
) -> Iterator[Result]:
    """Yield the result of each cut, once it is judged and written to its run's directory, if there
    is one.

    `cuts`: the name of each size, what it was cut from, and the cut.
    """
    services, judge, dense = ready.run.services, None, None
    if ready.run.resolved.recipe.output.evaluate:
        judge = judge_of(ready)
        dense = judged_dense(ready, judge)
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
            summary = finish(directory, summary, run.resolved.recipe)
        yield Result(
            run.model,
            tokenizer_of(opened),
            run.resolved.recipe,
            cut.keeps,
            run.resolved.layers,
            summary,
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
            kept=None if opened.trim is None else opened.trim.kept,
            carry_from=opened.directory,
        )
        (directory / RECIPE_FILE).write_text(dump_recipe(resolved.recipe), encoding="utf-8")
        write_keeps(directory, resolved.layers if resolved.depth else (), cut.keeps)
        for sentence in left_behind:
            services.log.note(sentence)
    with services.log.time("verify"):
        return prove_reload(
            run.model, directory, run.text.domains[0].held_out.ids_NT, services.progress
        )
