"""`secateur compare`: run a study's grid of methods, shares and seeds; finished cells are saved.

In: a `Study`, from YAML. Out: a `Comparison`, and its tables. A method is recipe keys over the
study's. A cell is the run that `prune` is, in memory, and the text that judges it is the same for
all of a seed.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError, SecateurError
from secateur.evaluation.parts import Subject
from secateur.evaluation.study import (
    DENSE,
    Cell,
    Comparison,
    FoundCell,
    Study,
    cells,
    load_study,
    save_comparison,
)
from secateur.evaluation.tasks import LoadedTasks, TaskOptions, load_tasks, run_task
from secateur.evaluation.text import Judged, losses_of_dense_tokens, named_blocks
from secateur.log import Progress, Tell, mute, silent, versions
from secateur.pruning.cut import cut_and_polish
from secateur.pruning.open import Opened, open_model, tokenizer_of
from secateur.pruning.prepare import prepared
from secateur.pruning.resolve import checked, resolve
from secateur.pruning.text import completed, run_text
from secateur.ranks import in_turns, is_first, joined
from secateur.result_directory import check_outside_results
from secateur.store import Services, Store
from secateur.stream.device import keeping_freed

CELLS_FOLDER = "cells"


@dataclass(frozen=True, slots=True)
class _Shared:
    """What every cell needs. `opened`: with its tokenizer. `dense`: the dense model's files."""

    study: Study
    opened: Opened
    dense: Subject
    tasks: LoadedTasks
    store: Store
    progress: Progress

    @property
    def services(self) -> Services:
        """What a cell reports to: its steps are not saved, the cell as a whole is."""
        return Services(progress=self.progress)

    def asking(self, cell: Cell) -> Opened:
        """Return the model with a cell's recipe."""
        return completed(self.opened.asking(cell.recipe))


@joined()
@keeping_freed()
def compare(
    study: Study | Path | str,
    out: Path | str,
    *,
    model: str | None = None,
    small: bool = False,
    progress: Progress = silent,
    tell: Tell = mute,
) -> Comparison:
    """Run the missing cells of a study's grid; write tables, study and results to `out`.

    `study`: a YAML file, or a shipped study by its name. `out`: the directory, which also holds
    every finished cell. `model`: in place of the study's. `small`: run the study's short form.
    `progress`: called with (stage, done, total). `tell`: gets a line about every finished cell that
    is damaged on disk and runs again.

    Returns the record of all cells. Under torchrun every process calls this. Ranks take whole cells
    by turns, each runs its cell as one process would, and the first one writes.

    Raises a SecateurError for what a user can correct, before the first cell runs if a method
    cannot reach its share.
    """
    if not isinstance(study, Study):
        study = load_study(str(study), small=small, model=model)
    out, progress = Path(out), progress if is_first() else silent
    check_outside_results(out)
    if out.is_dir() and any(out.iterdir()) and not (out / CELLS_FOLDER).is_dir():
        raise RecipeError(
            f"compare {out}: holds other files, and no earlier compare; choose a new directory."
        )

    # Every mistake shows before the first cell runs.
    shared, work = _shared(study, out, progress, tell), list(cells(study))
    progress("cells", 0, len(work))
    judged: dict[int, Judged] = {}

    def finish(number: int) -> FoundCell:
        cell = work[number]
        if cell.seed not in judged:
            judged[cell.seed] = _judged_on(
                shared, next(other for other in work if other.seed == cell.seed)
            )
        finished = _finished(shared, cell, judged[cell.seed])
        progress("cells", number + 1, len(work))
        return finished

    comparison = Comparison(tuple(in_turns(finish, list(range(len(work))))), versions())
    if is_first():
        save_comparison(study, comparison, out)
    return comparison


def _shared(study: Study, out: Path, progress: Progress, tell: Tell) -> _Shared:
    """Return what the cells need. Raises what a user can correct, naming the cell."""
    dense, *others = cells(study)
    opened = open_model(study.model, dense.recipe)
    for cell in (cell for cell in others if cell.ratio):
        try:
            resolve(checked(opened.asking(cell.recipe)))
        except SecateurError as error:
            raise type(error)(
                f"study, method '{cell.method}' at {cell.ratio:.0%}: {error}"
            ) from None
    assert opened.checkpoint is not None, "a study names its models"
    evaluation = study.evaluation
    options = TaskOptions(
        limit=evaluation.limit, batch_size=evaluation.batch_size, run_code=evaluation.run_code
    )
    return _Shared(
        study=study,
        opened=replace(opened, tokenizer=tokenizer_of(opened)),
        dense=Subject(DENSE, opened.checkpoint, opened.arch, opened.device),
        tasks=load_tasks(evaluation.tasks, options, evaluation.tasks_data),
        store=Store.lasting(out / CELLS_FOLDER, tell),
        progress=progress,
    )


def _judged_on(shared: _Shared, dense: Cell) -> Judged:
    """Return the blocks that a seed's cells are judged on: those that no cell learns by, and the
    others.
    """
    opened, evaluation = shared.asking(dense), shared.study.evaluation
    text = run_text(opened, shared.progress, num_judged_blocks=evaluation.num_blocks)
    drawn = text.drawn(opened, resolve(opened))
    if any(blocks.is_meta for blocks in drawn.judged.blocks.values()):  # the dense model's answers
        answers = text.answers(replace(opened, model=shared.dense.load()), shared.services)
        drawn = drawn.written(opened, answers)
    length, tokenizer = drawn.learning.sequence_length, tokenizer_of(opened)
    others, _ = named_blocks(
        evaluation.others, evaluation.num_blocks, length, tokenizer, shared.progress
    )
    return Judged(
        drawn.judged.blocks, others, drawn.learning.content_hash + drawn.judged.content_hash
    )


def _finished(shared: _Shared, cell: Cell, judged: Judged) -> FoundCell:
    """Return a cell, from the store if it is there."""

    def compute() -> dict[str, Any]:
        figures: dict[str, Any] = {"remove_reached": 0.0, "seconds": 0.0}
        if cell.is_dense:
            opened = replace(shared.opened, model=shared.dense.load())
        else:
            start, num_blocks = time.perf_counter(), shared.study.evaluation.num_blocks
            ready = prepared(shared.asking(cell), shared.services, num_judged_blocks=num_blocks)
            run = next(cut_and_polish(ready.run, force=True, cut=cell.ratio > 0)).run
            figures["seconds"] = time.perf_counter() - start
            figures["remove_reached"] = 1 - (
                run.model.num_parameters() / shared.opened.size.num_params
            )
            figures["num_tokens"] = {
                domain.name: domain.calibration.num_tokens for domain in run.text.domains
            }
            opened = replace(ready.opened, model=run.model, arch=run.arch)
        place = {"method": cell.method, "ratio": cell.ratio, "seed": cell.seed}
        return place | figures | _judge(shared, opened, judged)

    name = f"{cell.method}-{cell.ratio:g}-{cell.seed}"
    depends_on = _depends_on(shared, cell, judged)
    return shared.store.value(name, compute, kind=FoundCell, depends_on=depends_on)


def _depends_on(shared: _Shared, cell: Cell, judged: Judged) -> dict[str, Any]:
    return {
        **shared.dense.facts,
        "recipe": None if cell.is_dense else cell.recipe.model_dump(mode="json"),
        "seed": cell.seed,
        "evaluation": shared.study.evaluation.model_dump(mode="json"),
        "text": judged.content_hash,
        "others": {name: int(blocks.ids_NT.sum()) for name, blocks in judged.others.items()},
    }


def _judge(shared: _Shared, opened: Opened, judged: Judged) -> dict[str, Any]:
    """Return the losses of a cell's model, by document too, and its tasks. `opened`: the model as
    it is now.
    """
    tasks: dict[str, Any] = {}
    losses, others = (
        losses_of_dense_tokens(opened.model, opened.arch, blocks, opened.trim, shared.progress)
        for blocks in (judged.held_out, judged.others)
    )
    for name, task in shared.tasks.tasks.items():
        listen = partial(shared.progress, name)
        result = run_task(task, opened.model, tokenizer_of(opened), shared.tasks.options, listen)
        tasks[name] = {
            key: value
            for key, value in result["results"][name].items()
            if isinstance(value, int | float)
        }
    return {"losses": losses, "others": others, "tasks": tasks}
