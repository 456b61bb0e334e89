"""`secateur compare`: run a study's grid of methods, shares and seeds; finished cells are saved.

In: a `Study`, from YAML. Out: a `Comparison`, and a page. A method is recipe keys over the study's.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from secateur.data.blocks import Blocks
from secateur.data.retokenised import retokenised
from secateur.errors import RecipeError, SecateurError
from secateur.evaluation.parts import Subject, subject_of
from secateur.evaluation.study import (
    DENSE,
    TRAINED_DENSE,
    Cell,
    Comparison,
    Evaluation,
    Foreseen,
    FoundCell,
    Study,
    cells,
    load_study,
    study_recipe,
)
from secateur.evaluation.study_page import save_comparison
from secateur.evaluation.tasks import LoadedTasks, TaskOptions, load_tasks, run_task
from secateur.evaluation.text import named_blocks
from secateur.facts import Loss, Size
from secateur.log import Progress, silent, versions
from secateur.model.bind import Arch
from secateur.model.kept_tokens import Trim
from secateur.pruning.loop import prune_in_place, remove_depth
from secateur.pruning.open import Opened, open_model, tokenizer_of
from secateur.pruning.resolve import Resolved, checked, resolve
from secateur.pruning.run import Run, without_tokens
from secateur.pruning.text import Drawn, RunText, run_text, with_share_of_answers
from secateur.pruning.trim import plan_trim
from secateur.ranks import in_turns, is_first, joined
from secateur.recovery.polish import Lesson, learn, polish
from secateur.report.report import missing_plots
from secateur.store import Services, Store
from secateur.stream.device import keeping_freed, on_device
from secateur.stream.losses import domain_losses, predicted_tokens


class Judged(NamedTuple):
    """Blocks of the dense tokenizer by domain: of documents that no cell learns by, and others.

    `content_hash`: of the first, and of what the study calibrates on.
    """

    held_out: Mapping[str, Blocks]
    others: Mapping[str, Blocks]
    content_hash: str


CELLS_FOLDER = "cells"


@dataclass(frozen=True, slots=True)
class _Shared:
    """What every cell of a model needs. `name`: the model's in tables. `opened`: with its tokenizer.

    `dense`: the dense model's files.
    """

    name: str
    study: Study
    opened: Opened
    dense: Subject
    tasks: LoadedTasks | None
    store: Store
    progress: Progress

    @property
    def num_blocks(self) -> int:
        """Held-out blocks per domain that every cell is judged on."""
        return self.study.evaluation.num_blocks


def foresee(study: Study) -> list[Foreseen]:
    """Return what `compare` will run, from configs alone.

    Raises what `compare` raises before its first cell.
    """
    found = []
    for name, model in study.by_name.items():
        for cell, asked, resolved in _checked_cells(study, name, _opened(study, model)):
            if cell.seed != study.seeds[0]:
                continue
            # Embedding and head; the layers as they were before the first round.
            in_layers = sum(asked.arch.params_per_layer) * asked.model.dtype.itemsize
            copies = int(len(resolved.plans) > 1 and bool(resolved.target_mix))
            disk_bytes = asked.size.num_bytes + (copies - 1) * in_layers
            found.append(Foreseen(cell.method, cell.ratio, len(study.seeds), disk_bytes, name))
    return found


def _opened(study: Study, model: str) -> Opened:
    return open_model(model, study_recipe(study, study.seeds[0]))


def _checked_cells(study: Study, name: str, opened: Opened) -> list[tuple[Cell, Opened, Resolved]]:
    """Return a model's cells, each with the model as its recipe opens it. Raises what a user can correct."""
    found = []
    for cell in cells(study):
        try:
            asked = checked(opened.asking(cell.recipe))
            found.append((cell, asked, resolve(asked)))
        except SecateurError as error:
            raise type(error)(f"study, model {name}, method '{cell.method}' at {cell.ratio:.0%}: {error}") from None
    return found


@joined()
def compare(
    study: Study | Path | str,
    out: Path | str,
    *,
    model: str | Sequence[str] | None = None,
    small: bool = False,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run the missing cells of a study's grid; write table, study, results and page to `out`.

    `study`: a YAML file, or a shipped study by its name. `out`: the directory, which
    also holds every finished cell. `model`: one or several, in place of the study's. `small`: run
    the study's short form. `progress`: called with (stage, done, total). `tell`: gets a line about every
    finished cell that is damaged on disk and runs again.

    Returns the record of all cells. Under torchrun every process calls this. Ranks take whole cells by
    turns, each runs its cell as one process would, and the first one writes.

    Raises a SecateurError for what a user can correct, before the first cell runs if a method
    cannot reach its share.
    """
    if not isinstance(study, Study):
        study = load_study(str(study), small=small, model=model)
    return _compare(study, Path(out), progress if is_first() else silent, tell)


@keeping_freed()
def _compare(study: Study, out: Path, progress: Progress, tell: Callable[[str], None]) -> Comparison:
    if missing_plots():
        raise RecipeError("compare: the page of a study needs matplotlib; run pip install 'secateur[report]'.")
    if out.is_dir() and any(out.iterdir()) and not (out / CELLS_FOLDER).is_dir():
        raise RecipeError(f"compare {out}: holds other files, and no earlier compare; choose a new directory.")
    opened = {name: _opened(study, model) for name, model in study.by_name.items()}
    for name, each in opened.items():
        _checked_cells(study, name, each)
    names = study.evaluation.tasks
    tasks = load_tasks(names, _task_options(study.evaluation), None) if names else None
    opened = {name: replace(each, tokenizer=tokenizer_of(each)) for name, each in opened.items()}
    store, grids = Store.lasting(out / CELLS_FOLDER, tell), list[_Shared]()
    for name, each in opened.items():
        assert each.checkpoint is not None, "a study names its models"
        dense = subject_of(DENSE, each.checkpoint, each.arch, each.device)
        grids.append(_Shared(name, study, each, dense, tasks, store, progress))
    blocks: dict[tuple[str, int], Judged] = {}
    work: list[tuple[_Shared, int, Cell | str]] = []  # a name: the dense model, as it is or trained
    for seed in study.seeds:
        for shared in grids:
            work += [(shared, seed, DENSE), *((shared, seed, cell) for cell in cells(study) if cell.seed == seed)]
            work += [(shared, seed, TRAINED_DENSE)] if study.train_dense else []
    progress("cells", 0, len(work))

    def finish(number: int) -> FoundCell:
        shared, seed, cell = work[number]
        judged = blocks.get((shared.name, seed)) or _judged_on(shared, seed)
        blocks[shared.name, seed] = judged
        found = _dense_cell(shared, cell, seed, judged) if isinstance(cell, str) else _cell(shared, cell, judged)
        progress("cells", number + 1, len(work))
        return found

    comparison = Comparison(tuple(in_turns(finish, list(range(len(work))))), versions())
    if is_first():
        save_comparison(study, comparison, out)
    return comparison


def _judged_on(shared: _Shared, seed: int) -> Judged:
    """Return the blocks that a seed's cells are judged on: those that no cell learns by, and the others."""
    opened = with_share_of_answers(checked(shared.opened.asking(study_recipe(shared.study, seed))))
    drawn = _drawn(shared, opened, _run_text(shared, opened), shared.dense.load)
    others, length = shared.study.evaluation.others, drawn.learning.sequence_length
    asked = (shared.num_blocks, length, tokenizer_of(opened), shared.progress)
    unseen = named_blocks(others, *asked)[0] if others else {}
    return Judged(drawn.judged.blocks, unseen, drawn.learning.content_hash + drawn.judged.content_hash)


def _run_text(shared: _Shared, opened: Opened) -> RunText:
    """Return the text of a cell; that which judges comes first, and so is the same for all cells of a seed."""
    return run_text(opened, shared.progress, num_judged_blocks=shared.num_blocks)


def _drawn(shared: _Shared, opened: Opened, text: RunText, load: Callable[[], Any]) -> Drawn:
    """Return the text, with what the dense model writes. `load`: returns it, if it is to write some."""
    drawn = text.drawn(opened, resolve(opened))
    is_written = all(not blocks.is_meta for blocks in drawn.judged.blocks.values())
    if is_written:
        return drawn
    return drawn.written(opened, text.answers(replace(opened, model=load()), Services(progress=shared.progress)))


def _dense_cell(shared: _Shared, name: str, seed: int, blocks: Judged) -> FoundCell:
    """Judge the dense model, as it is or after the polish that its own text would give it.

    Training on a domain's text also adapts the dense model to it: what a polish wins beyond that is
    repair. It has nothing to be distilled from, so that it learns by cross-entropy alone.
    """
    recipe = study_recipe(shared.study, seed).filled(polish={"kl_share": 0.0}) if name == TRAINED_DENSE else None

    def compute() -> dict[str, Any]:
        start, subject = time.perf_counter(), replace(shared.dense)
        if recipe is not None:
            opened, services = (
                with_share_of_answers(checked(shared.opened.asking(recipe))),
                Services(progress=shared.progress),
            )
            run, lesson = _dense_run(shared, opened, services, _run_text(shared, opened))
            _polish(run, lesson, opened)
            subject = replace(shared.dense, loaded=run.model)
        seconds = 0.0 if recipe is None else time.perf_counter() - start
        return {"remove_reached": 0.0, "seconds": seconds} | _judge(shared, subject, blocks, None)

    asked = {} if recipe is None else recipe.model_dump(mode="json")
    result = shared.store.value(f"{name}-{seed}", compute, depends_on=_depends_on(shared, seed, asked, blocks))
    return FoundCell(name, 0.0, seed, **result, model=shared.name)


def _cell(shared: _Shared, cell: Cell, blocks: Judged) -> FoundCell:
    def compute() -> dict[str, Any]:
        opened, services = (
            with_share_of_answers(checked(shared.opened.asking(cell.recipe))),
            Services(progress=shared.progress),
        )
        start, text = time.perf_counter(), _run_text(shared, opened)
        if cell.recipe.remove.vocabulary is not None:
            opened = replace(opened, trim=plan_trim(opened, services, text.learning).trim)
        run, lesson = _dense_run(shared, opened, services, text)
        run = remove_depth(run)
        prune_in_place(run)
        _polish(run, lesson, opened)
        seconds = time.perf_counter() - start
        reached = 1 - Size.of(run.model).num_params / Size.of(shared.opened.model).num_params
        num_tokens = {domain.name: domain.calibration.num_tokens for domain in run.text.domains}
        facts = {"remove_reached": reached, "seconds": seconds, "num_tokens": num_tokens}
        subject = replace(shared.dense, arch=run.arch, loaded=run.model)
        return facts | _judge(shared, subject, blocks, opened.trim)

    depends_on = _depends_on(shared, cell.seed, cell.recipe.model_dump(mode="json"), blocks)
    result = shared.store.value(f"{cell.method}-{cell.ratio:g}-{cell.seed}", compute, depends_on=depends_on)
    return FoundCell(cell.method, cell.ratio, cell.seed, **result, model=shared.name)


def _dense_run(shared: _Shared, opened: Opened, services: Services, text: RunText) -> tuple[Run, Lesson | None]:
    """Return a run whose model is dense still, and what that model teaches."""
    resolved, trim, model = resolve(opened), opened.trim, shared.dense.load()
    learning = _drawn(shared, opened, text, lambda: model).learning
    run = Run(model=model, arch=opened.arch, resolved=resolved, text=learning, services=services)
    if trim is not None:
        run = without_tokens(run, trim, force=True)
    return run, learn(model, run.arch, learning, run.resolved.recipe, services)


def _polish(run: Run, lesson: Lesson | None, opened: Opened) -> None:
    if lesson is not None:
        polish(run.model, lesson, run.resolved.recipe.seed, run.services, opened.device)
        on_device(run.model, opened.device)


def _depends_on(shared: _Shared, seed: int, recipe: dict[str, Any], blocks: Judged) -> dict[str, Any]:
    return {
        "model": shared.dense.fingerprint,
        "recipe": recipe,
        "seed": seed,
        "device": shared.dense.device.type,
        "evaluation": shared.study.evaluation.model_dump(mode="json"),
        "text": blocks.content_hash,
        "others": {name: int(part.ids_NT.sum()) for name, part in blocks.others.items()},
        "versions": versions(),
    }


def _task_options(evaluation: Evaluation) -> TaskOptions:
    return TaskOptions(limit=evaluation.limit, batch_size=evaluation.batch_size, run_code=evaluation.run_code)


def _judge(shared: _Shared, subject: Subject, blocks: Judged, trim: Trim | None) -> dict[str, Any]:
    model, evaluation, tasks = subject.model(), shared.study.evaluation, {}
    parts = blocks.held_out, blocks.others
    losses = [_losses(model, subject.arch, part, trim, shared.progress) if part else {} for part in parts]
    nats = [{name: loss.nats_per_token for name, loss in part.items()} for part in losses]
    document_nats = {name: loss.document_nats for name, loss in losses[0].items()}
    document_tokens = {name: loss.document_tokens for name, loss in losses[0].items()}
    options = _task_options(evaluation)
    tokenizer = tokenizer_of(shared.opened) if trim is None else trim.tokenizer
    for name, task in (shared.tasks.tasks if shared.tasks else {}).items():
        found = run_task(task, model, tokenizer, options, partial(shared.progress, name))
        tasks[name] = {key: value for key, value in found["results"][name].items() if isinstance(value, int | float)}
    return {
        "nats_per_token": nats[0],
        "others": nats[1],
        "tasks": tasks,
        "document_nats": document_nats,
        "document_tokens": document_tokens,
    }


def _losses(
    model: Any, arch: Arch, blocks: Mapping[str, Blocks], trim: Trim | None, progress: Progress
) -> dict[str, Loss]:
    """Return losses by domain, in nats per token of the dense tokenizer."""
    if trim is None:
        return domain_losses(model, arch, blocks, progress)
    counts = {name: predicted_tokens(part) for name, part in blocks.items()}
    read = retokenised(blocks, trim.dense_tokenizer, trim.tokenizer)
    return domain_losses(model, arch, read, progress, num_tokens=counts)
