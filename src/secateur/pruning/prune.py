"""One prune: open, tokens, resolve, text, load, layers, rounds, polish, save, verify, result, report.

All that can be checked without weights is checked before a weight is read.
`api.prune` adds recovery.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from secateur.log import Progress, RunLog, silent
from secateur.model.checkpoint import CausalLM, Tokenizer, eval_mode
from secateur.model.kept_units import Keeps
from secateur.pruning.cost import MemoryPlan, check_disk, memory_for, with_polish_that_fits
from secateur.pruning.like import opened_like, recipe_like
from secateur.pruning.loop import prune_in_place, remove_depth
from secateur.pruning.open import (
    Opened,
    check_same_run,
    computes_in_float32,
    loaded,
    onload,
    open_model,
    store_for,
    tokenizer_of,
)
from secateur.pruning.resolve import Resolved, checked, resolve
from secateur.pruning.result import Result, calibration_facts, foretold, save_and_prove, save_pruned, summary_of
from secateur.pruning.run import Run, without_tokens
from secateur.pruning.text import Drawn, run_text, with_share_of_answers, without_answers
from secateur.pruning.trim import plan_trim
from secateur.ranks import from_first, is_first, size, staging_if_any
from secateur.recipe import Recipe
from secateur.recovery.polish import learn, polish
from secateur.report.measured import PolishRecord
from secateur.report.records import Summary
from secateur.store import Services
from secateur.stream.device import keeping_freed, peak_bytes, peak_bytes_on
from secateur.stream.judge import Judge, Judgement, ToJudge
from secateur.stream.offload import Placement
from secateur.stream.threads import choose_threads, threads_kept

# A run that names the tokens of a domain that judge it gets a share of prompts and documents, all with so many.
TOKENS_BESIDE_ALL = 1024
# Writes card, result.json and page into the run's directory; returns the summary as it was written.
Finish = Callable[[Path, Summary, Recipe], Summary]


@keeping_freed()
@threads_kept()
def prune_run(
    model: CausalLM | str | Path,
    recipe: Recipe,
    *,
    finish: Finish,
    out: Path | str | None = None,
    like: Path | str | None = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    resume: bool = False,
    force: bool = False,
    command: str = "",
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> Result:
    """Prune a causal LM, without the recipe's `recover`. Arguments, errors: see `api.prune`.

    `finish`: writes what people read of a finished run.
    """
    recipe = recipe if like is None else recipe_like(Path(like), recipe)
    opened = open_model(model, recipe, tokenizer)
    opened = with_share_of_answers(checked(opened if like is None else opened_like(opened, Path(like))))
    place, log = None if out is None else Path(os.path.abspath(out)), RunLog()
    computes = {"device": str(opened.device), "in float32": computes_in_float32(opened)}
    computes |= {"units that stay": opened.like and opened.like.digest}
    target = staging_if_any(place, overwrite=overwrite, protected=opened.directory, tell=tell)
    options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "tell": tell}
    with store_for(place, opened.recipe, opened.checkpoint, computes, log, **options) as store, target as directory:
        if directory is not None:
            log.append_to(directory)
        services = Services(progress=progress, log=log, store=store, scratch=directory, tell=tell)
        ready = prepared(opened, services)
        with eval_mode(ready.run.model):
            result = _pruned(ready, directory, command, finish, force=force)
    return replace(result, out=None if out is None else Path(out))


class Prepared(NamedTuple):
    """A run whose model is still dense, with its weights. `opened`: with its tokenizer, and the trim of it."""

    opened: Opened
    run: Run
    drawn: Drawn
    placement: Placement


def _pruned(ready: Prepared, directory: Path | None, command: str, finish: Finish, *, force: bool) -> Result:
    """Return the result of a run, and write it to the directory."""
    opened, run, drawn, placement = ready
    services, judge = run.services, _judge_of(ready)
    measured: dict[str, Any] = {"calibration": calibration_facts(drawn), "lineage": opened.lineage}
    measured |= {"dense_losses": {}, "pruned_losses": {}}
    # Each token of an answer would move the weights that are not in memory.
    asks = not (run.weights_on_disk or placement.one_at_a_time)
    dense = None if judge is None else _judged(run, "dense", partial(judge.dense, asks=asks))
    run, keeps, polished = shaped(ready, directory, force=force)
    measured |= {"polish": polished, "peak_bytes": peak_bytes()}
    if judge is not None and dense is not None:
        pruned = _judged(run, "pruned", judge.pruned)
        measured |= {"dense_losses": dense.domains, "pruned_losses": pruned.domains}
        measured |= {"other_text": (dense.other, pruned.other), "own_answers": pruned.answers}
    services.store.note_found()
    measured |= {"device_peak_bytes": peak_bytes_on(opened.device)}
    placement.offload()
    proof = None if directory is None else save_and_prove(opened, run, keeps, directory)
    summary = summary_of(opened, run, keeps, proof, command=command, **measured)
    if directory is not None:
        services.log.write({"event": "seconds", **summary.seconds})
        summary = finish(directory, summary, run.resolved.recipe)
    return Result(run.model, tokenizer_of(opened), run.resolved.recipe, keeps, run.resolved.layers, summary)


def _judge_of(ready: Prepared) -> Judge | None:
    """Return what judges the run, None if nothing is to."""
    opened, run, drawn, _ = ready
    evaluate = run.resolved.recipe.output.evaluate
    if not evaluate:
        return None
    text, services, config = drawn.judged.blocks, run.services, run.model.config
    share = 1.0 if evaluate is True else evaluate / TOKENS_BESIDE_ALL
    return Judge(text, tokenizer_of(opened), config, services.store, services.progress, opened.trim, share)


def _judged(run: Run, which: str, judged: Callable[[ToJudge], Judgement]) -> Judgement:
    """Judge the run's model as it is now."""
    with run.services.log.time("evaluate"):
        return judged(ToJudge(which, lambda: (run.model, run.arch), run.text.sequence_length))


def shaped(
    ready: Prepared, directory: Path | None = None, *, force: bool = False, cut: bool = True
) -> tuple[Run, Keeps, PolishRecord | None]:
    """Take tokens, layers and units from the model, in place, and polish it. Return the run then, and what stays.

    `directory`: where rounds are kept. `force`: a trim may cost more than was foretold. Without `cut`
    the dense model is polished, by what the recipe would polish the pruned one by.
    """
    opened, run, _, placement = ready
    services, keeps, polished = run.services, Keeps(), None
    if opened.trim is not None:
        run = without_tokens(run, opened.trim, force=force)
    recipe = run.resolved.recipe
    walked = cut and _walk_has_dense_states(opened, run)
    lesson = learn(run.model, run.arch, run.text, recipe, services, walked=walked)
    if lesson is not None and walked:
        run = replace(run, after_dense=partial(lesson.take_states, run.model))

    # Whole layers go first, then units, round by round.
    if cut:
        with services.log.time("prune"):
            run = remove_depth(run)
            if directory is not None and recipe.output.keep_rounds:
                run = replace(run, after_round=partial(_save_round, opened, run, placement, directory))
            keeps = prune_in_place(run)

    if lesson is not None:
        with placement.on_host():
            polished = polish(run.model, lesson, recipe.seed, services, opened.device)
    return run, keeps, polished


def _walk_has_dense_states(opened: Opened, run: Run) -> bool:
    """Whether the prune's dense stream ends in what the polish asks the dense model for, on the same text."""
    resolved = run.resolved
    whole = opened.trim is None and not resolved.depth and size() == 1
    walks_once = len(resolved.plans) == 1 and resolved.removals[0] > 0 and resolved.target_mix > 0
    return whole and walks_once


def _save_round(opened: Opened, run: Run, placement: Placement, directory: Path, number: int, keeps: Keeps) -> None:
    with placement.on_host():
        save_pruned(opened, run, keeps, directory, number)


def prepared(opened: Opened, services: Services, *, num_judged_blocks: int | None = None) -> Prepared:
    """Return a run up to where its model is loaded, and in place on the device.

    `num_judged_blocks`: of each domain, to judge by; None: as the recipe says.

    Raises a SecateurError for what the recipe, the memory or the text does not allow.
    """
    opened = replace(opened, tokenizer=tokenizer_of(opened))
    text = run_text(opened, services.progress, num_judged_blocks=num_judged_blocks)
    if opened.recipe.remove.vocabulary is not None:
        opened = plan_trim(opened, services, text)
    resolved, log = with_polish_that_fits(opened, resolve(opened)), services.log
    plan = memory_for(opened, resolved)
    if plan.weights_on_disk or plan.one_layer_at_a_time:
        resolved = _without_answers(opened, resolved)
    if services.scratch is not None:
        check_disk(services.scratch, opened, resolved, plan)
    if is_first():
        services.tell(foretold(opened, resolved, plan))
    with log.time("calibration"):
        drawn = from_first(partial(text.drawn, opened, resolved))
    text_notes = (*drawn.learning.notes, *drawn.judged.notes)
    if is_first():
        for sentence in text_notes:
            services.tell(sentence)
    with log.time("load"):
        services.progress("load", 0, 1)
        opened, notes = loaded(opened, on_disk=plan.weights_on_disk)
        resolved = replace(resolved, warnings=resolved.warnings + text_notes + notes + _notes(opened, plan))
        check_same_run(opened.model, resolved.recipe)
        placement = onload(opened, one_at_a_time=plan.one_layer_at_a_time, in_float32=plan.in_float32)
        if opened.device.type == "cpu" and size() == 1:
            choose_threads(opened.model, opened.arch, services)
        services.progress("load", 1, 1)
    model = opened.model
    with log.time("calibration"), eval_mode(model):
        if any(blocks.is_meta for blocks in drawn.learning.held_out.values()):
            drawn = drawn.written(opened, text.answers(opened, services))
        services.store.check_input("calibration text", drawn.learning.content_hash + drawn.judged.content_hash)
    run = Run(
        model=model,
        arch=opened.arch,
        resolved=resolved,
        text=drawn.learning,
        services=services,
        weights_on_disk=plan.weights_on_disk,
        kept={} if opened.like is None else opened.like.keeps,
    )
    return Prepared(opened, run, drawn, placement)


def _without_answers(opened: Opened, resolved: Resolved) -> Resolved:
    """Return the run without what the model would answer: each token would move all weights."""
    if not any(domain.answers for domain in resolved.recipe.calibration.domains.values()):
        return resolved
    recipe = without_answers(opened.asking(resolved.recipe)).recipe
    note = "calibration.answers: the model's weights are not all in its memory, so it answers nothing."
    return replace(resolved, recipe=recipe, warnings=(*resolved.warnings, note))


def _notes(opened: Opened, plan: MemoryPlan) -> tuple[str, ...]:
    """Return notes for people on how the run keeps within memory."""
    notes: tuple[str, ...] = ()
    if plan.one_layer_at_a_time and plan.budget_bytes is not None:
        limit = f"{plan.budget_bytes / 1e9:.2f} GB"
        notes += (f"layers came to {opened.device} one at a time to keep within {limit}.",)
    if plan.in_float32:
        stored = str(opened.model.dtype).removeprefix("torch.")
        notes += (f"computed in float32 on {opened.device}; stored in {stored} as before.",)
    return notes
