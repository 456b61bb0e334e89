"""A run up to where its model is loaded and still dense: its text, its memory, what judges it.

In: an opened model. Out: a `Prepared` run.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from secateur.log import Progress, Tell, human_bytes
from secateur.model.group import by_name
from secateur.model.stock import eval_mode
from secateur.pruning.cost import MemoryPlan, disk_bytes, memory_for, with_polish_that_fits
from secateur.pruning.open import (
    Opened,
    check_same_run,
    inputs_of,
    loaded,
    onload,
    tokenizer_of,
)
from secateur.pruning.resolve import Resolved, resolve
from secateur.pruning.run import Run
from secateur.pruning.text import Drawn, run_text, without_answers
from secateur.pruning.trim import plan_trim
from secateur.ranks import from_first, size
from secateur.store import Services, begun
from secateur.stream.device import Placement, fastest_threads, keeping_freed, threads_kept
from secateur.stream.judge import Judge, Judgement, ToJudge
from secateur.stream.walk import CPU_BATCH_TOKENS, Batch, Walk

# The user's own number of threads, which stands.
THREADS = "OMP_NUM_THREADS"
# A run that names the tokens of a domain that judge it gets a share of prompts and documents, all
# with so many.
TOKENS_BESIDE_ALL = 1024


@contextmanager
def begun_run(
    opened: Opened, out: Path | str | None, *, overwrite: bool, progress: Progress, tell: Tell
) -> Iterator[Services]:
    """Yield the services of a run, see `begun`; a model in memory cannot go on, because a run cuts
    it in place.

    Inside it a model in memory is in eval mode, as loaded ones are, freed memory is kept, and a run
    may choose how many threads torch has; behind it all is as before.
    """
    inputs = None if opened.checkpoint is None else partial(inputs_of, opened, opened.checkpoint)
    job = begun(
        out, inputs, overwrite=overwrite, protected=opened.directory, progress=progress, tell=tell
    )
    with keeping_freed(), threads_kept(), eval_mode(opened.model), job as services:
        yield services


class Prepared(NamedTuple):
    """A run whose model is still dense, with its weights. `opened`: with its tokenizer, and the
    trim of it.

    `notes`: for people, on the text, on the weights and on memory, beside what `run` warns of.
    """

    opened: Opened
    run: Run
    drawn: Drawn
    placement: Placement
    notes: tuple[str, ...]


def prepared(
    opened: Opened,
    services: Services,
    *,
    num_judged_blocks: int | None = None,
    does: str = "removes",
    num_models: int = 1,
    num_results: int = 1,
) -> Prepared:
    """Return a run up to where its model is loaded, and in place on the device.

    `num_judged_blocks`: of each domain, to judge by; None: as the recipe says. `does`: what is said
    of the share that goes. `num_models`: as many copies of the weights are in memory.
    `num_results`: are written.

    Raises a SecateurError for what the recipe, the memory or the text does not allow.
    """
    # Which tokens go, before anything is planned that depends on their number.
    opened = replace(opened, tokenizer=tokenizer_of(opened))
    text = run_text(opened, services.progress, num_judged_blocks=num_judged_blocks)
    if opened.recipe.remove.vocabulary is not None:
        opened = plan_trim(opened, services, text)

    # What the run takes, and does.
    resolved, log = with_polish_that_fits(opened, resolve(opened)), services.log
    plan = memory_for(opened, resolved)
    if plan.weights_on_disk or plan.one_layer_at_a_time:
        resolved = without_answers(resolved)
    services.check_space(disk_bytes(opened, resolved, plan, num_models, num_results))

    # Its text, before anything is said, then the weights, which write the answers among it.
    with log.time("calibration"):
        drawn = from_first(partial(text.drawn, opened, resolved))
    services.tell(foretold(opened, resolved, plan, does, num_models))
    text_notes = (*drawn.learning.notes, *drawn.judged.notes)
    for sentence in text_notes:
        services.tell(sentence)
    with log.time("load"):
        services.progress("load", 0, 1)
        opened = loaded(opened, on_disk=plan.weights_on_disk)
        notes = *text_notes, *opened.notes, *_notes(opened, plan)
        check_same_run(opened.model, resolved.recipe)
        placement = onload(
            opened,
            one_at_a_time=plan.one_layer_at_a_time,
            in_float32=plan.in_float32,
            keeps=plan.keeps_layers,
        )
        if opened.device.type == "cpu" and size() == 1:
            choose_threads(opened, services)
        services.progress("load", 1, 1)
    with log.time("calibration"):
        if any(blocks.is_meta for blocks in drawn.learning.held_out.values()):
            drawn = drawn.written(opened, text.answers(opened, services))
        services.store.check_input(
            "calibration text", drawn.learning.content_hash + drawn.judged.content_hash
        )

    run = Run(
        model=opened.model,
        arch=opened.arch,
        resolved=resolved,
        text=drawn.learning,
        services=services,
        trim=opened.trim,
        on_host=placement.on_host,
        weights_on_disk=plan.weights_on_disk,
    )
    return Prepared(opened, run, drawn, placement, notes)


def choose_threads(opened: Opened, services: Services) -> None:
    """Let torch compute with as many threads as make a layer fastest now; a run that goes on has
    those it began with.

    Nothing changes if the environment says how many.
    """
    if THREADS in os.environ or torch.get_num_threads() == 1:
        return

    def timed() -> int:
        blocks = Batch("", True, torch.zeros(1, CPU_BATCH_TOKENS, dtype=torch.int64))
        walk = Walk(opened.model, opened.arch, [blocks])
        with walk.layer(0):
            return fastest_threads(partial(walk.through, 0, walk.hidden_BTD[0]))

    count = services.store.value("threads", timed, is_input=True)
    torch.set_num_threads(count)
    services.log.write({"event": "threads", "count": count})


def foretold(
    opened: Opened, resolved: Resolved, plan: MemoryPlan, does: str, num_models: int
) -> str:
    """Return a sentence on what a run is about to do, and in how much memory for so many copies.
    `does`: its verb.
    """
    recipe, arch, kept = resolved.recipe, opened.arch, resolved.plans[-1].num_keep
    parts = [f"{resolved.depth} of {arch.num_layers} layers"] if resolved.depth else []
    for name, members in by_name(resolved.groups).items():
        before = sum(group.num_units for group in members) / len(members)
        after = sum(kept[group.key] for group in members) / len(members)
        parts += [
            f"{name} {before:,.0f} -> {after:,.0f}" + " on average" * (not resolved.is_uniform)
        ]
    if opened.trim is not None:
        parts += [f"tokens {opened.trim.kept.num_dense:,} -> {opened.trim.kept.num_kept:,}"]
    text = f"{resolved.num_tokens:,} tokens of {', '.join(recipe.calibration.domains)}"
    if not resolved.groups and not resolved.depth:
        return f"{opened.name}: removes {', '.join(parts)}, by {text}."
    trained = f", then trained on {recipe.polish.num_tokens:,}" if recipe.polish.num_tokens else ""
    num_bytes = plan.estimate.peak + (num_models - 1) * opened.size.num_bytes
    rounds = f"{len(resolved.plans)} rounds" if len(resolved.plans) > 1 else "1 round"
    share = f"{recipe.remove.share:.1%} of all {resolved.prices.total_text} ({', '.join(parts)})"
    return (
        f"{opened.name}: {does} {share} in {rounds}, measured on {text}{trained}; "
        f"{human_bytes(num_bytes)} of memory beyond the interpreter."
    )


def _notes(opened: Opened, plan: MemoryPlan) -> Iterator[str]:
    """Yield notes for people on how the run keeps within memory."""
    if plan.one_layer_at_a_time and plan.budget_bytes is not None:
        limit = human_bytes(plan.budget_bytes)
        yield f"layers came to {opened.device} one at a time to keep within {limit}."
    if plan.in_float32:
        stored = str(opened.model.dtype).removeprefix("torch.")
        yield f"computed in float32 on {opened.device}; stored in {stored} as before."


def judged_dense(ready: Prepared) -> tuple[Judge, Judgement]:
    """Return what judges the run, by as much text as the recipe says, and its dense judgement.

    That one answers if no token reads all text again or moves weights that are not in memory.
    """
    opened, run, drawn, placement, _ = ready
    services, evaluate = run.services, run.resolved.recipe.output.evaluate
    judge = Judge(
        drawn.judged.blocks,
        tokenizer_of(opened),
        run.model.config,
        services.store,
        services.progress,
        trim=opened.trim,
        share=1.0 if evaluate is True else evaluate / TOKENS_BESIDE_ALL,
    )
    asks = run.arch.caches and not (run.weights_on_disk or placement.one_at_a_time)
    return judge, judged(run, "dense", partial(judge.dense, asks=asks))


def judged(run: Run, which: str, judged: Callable[[ToJudge], Judgement]) -> Judgement:
    """Judge the run's model as it is now."""
    with run.services.log.time("evaluate"):
        return judged(ToJudge(which, lambda: (run.model, run.arch), run.text.sequence_length))
