"""One prune: open, tokens, resolve, text, load, layers, rounds, polish, save, verify, result, report.

All that can be checked without weights is checked before a weight is read.
`api.prune` adds recovery.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from secateur.files import check_free_space
from secateur.log import Progress, RunLog, silent
from secateur.model.checkpoint import Tokenizer, eval_mode
from secateur.model.modules import CausalLM
from secateur.pruning import own_answers
from secateur.pruning.cost import MemoryPlan, disk_bytes, memory_for, with_polish_that_fits
from secateur.pruning.latency import with_seconds
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
from secateur.pruning.result import (
    PrunedCheckpoint,
    Result,
    calibration_facts,
    foretold,
    opened_like,
    save_and_prove,
    summary_of,
)
from secateur.pruning.run import Keeps, Run, RunJudge, without_tokens
from secateur.pruning.text import Drawn, run_text, with_share_of_answers, without_answers
from secateur.pruning.trim import plan_trim
from secateur.ranks import from_first, is_first, staging_if_any
from secateur.recipe import Recipe
from secateur.recovery.polish import learn, polish
from secateur.report.records import Summary
from secateur.store import Services
from secateur.stream.device import keeping_freed, peak_bytes, peak_bytes_on
from secateur.stream.offload import Placement

# Writes card, result.json and page into the run's directory; returns the summary as it was written.
Finish = Callable[[Path, Summary, Recipe], Summary]


@keeping_freed()
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

    With `like` the recipe is that of `recipe_like`. `finish`: writes what people read of a finished run.
    """
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
        opened, run, drawn, placement = _prepared(opened, services)
        with eval_mode(run.model):
            result = _pruned(opened, run, drawn, placement, directory, command, finish, force=force)
    return replace(result, out=None if out is None else Path(out))


def _pruned(
    opened: Opened,
    run: Run,
    drawn: Drawn,
    placement: Placement,
    directory: Path | None,
    command: str,
    finish: Finish,
    *,
    force: bool,
) -> Result:
    """Return the result of a run whose model is still dense, and write it to the directory."""
    services, judge = run.services, RunJudge(drawn.judged, opened.trim)
    measured: dict[str, Any] = {"calibration": calibration_facts(drawn), "lineage": opened.lineage}
    measured["dense_losses"] = judge.losses(run, "dense")
    sheet = own_answers.asked(opened, run, placement)
    if opened.trim is not None:
        run = without_tokens(run, opened.trim, force=force)
    recipe = run.resolved.recipe
    lesson = learn(run.model, run.arch, run.text, recipe, services)
    run, checkpoint, keeps = _cut(opened, run, placement, directory)
    if lesson is not None:
        with placement.on_host():
            measured["polish"] = polish(run.model, lesson, recipe.seed, services, opened.device)
        lesson = None
    measured |= {"peak_bytes": peak_bytes(), "pruned_losses": judge.losses(run, "pruned")}
    measured["own_answers"] = own_answers.judged(opened, run, sheet)
    services.store.note_found()
    measured |= {"device_peak_bytes": peak_bytes_on(opened.device)}
    placement.offload()
    proof = None if checkpoint is None else save_and_prove(run, checkpoint, keeps)
    summary = summary_of(opened, run, keeps, proof, command=command, **measured)
    if directory is not None:
        services.log.write({"event": "seconds", **summary.seconds})
        summary = finish(directory, summary, run.resolved.recipe)
    return Result(run.model, tokenizer_of(opened), run.resolved.recipe, keeps, run.resolved.layers, summary)


def _cut(
    opened: Opened, run: Run, placement: Placement, directory: Path | None
) -> tuple[Run, PrunedCheckpoint | None, Keeps]:
    """Remove layers, then prune all rounds; return the run then, the checkpoint and the keeps."""
    checkpoint = None
    with run.services.log.time("prune"):
        run = remove_depth(run)
        recipe = run.resolved.recipe
        if directory is not None:
            facts = (directory, opened.directory, run.resolved.layers, opened.trim)
            checkpoint = PrunedCheckpoint(run.model, tokenizer_of(opened), recipe, *facts)
            if recipe.output.keep_rounds:
                run = replace(run, after_round=partial(_save_round, placement, checkpoint))
        keeps = prune_in_place(run)
    return run, checkpoint, keeps


def _save_round(placement: Placement, checkpoint: PrunedCheckpoint, number: int, keeps: Keeps) -> None:
    with placement.on_host():
        checkpoint.save(keeps, number)


def _prepared(opened: Opened, services: Services) -> tuple[Opened, Run, Drawn, Placement]:
    """Return what was opened with weights and tokenizer, the run, its text, and its placement on the device.

    Raises a SecateurError for what the recipe, the memory or the text does not allow.
    """
    opened = with_seconds(replace(opened, tokenizer=tokenizer_of(opened)), services)
    text = run_text(opened, services.progress)
    if opened.recipe.remove.vocabulary is not None:
        opened = plan_trim(opened, services, text.learning)
    resolved, log = with_polish_that_fits(opened, resolve(opened)), services.log
    plan = memory_for(opened, resolved)
    if plan.weights_on_disk or plan.one_layer_at_a_time:
        resolved = _without_answers(opened, resolved)
    if services.scratch is not None:
        check_free_space(services.scratch, disk_bytes(opened, resolved, plan))
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
    return opened, run, drawn, placement


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
