"""`secateur compare`: a study's grid of methods, ratios and seeds, run cell by cell; every finished cell is kept.

In: YAML, as a frozen `Study`. Out: a `Comparison`, and a page. A method is a recipe's keys over the study's own.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.calibration import CalibrationSet, build_calibration, with_sampled
from secateur.evaluation.study import Cell, Study, cells, comparison_files, dump_study, load_study, study_recipe
from secateur.evaluation.tasks import LoadedTasks, TaskOptions, load_tasks, run_task
from secateur.facts import Size
from secateur.files import disk_errors, staged_file
from secateur.log import Progress, silent, versions
from secateur.model.bind import Arch
from secateur.model.checkpoint import Checkpoint, fingerprint, load_model
from secateur.pruning.loop import prune_in_place, remove_depth
from secateur.pruning.open import Opened, open_model, tokenizer_of
from secateur.pruning.resolve import Resolved, checked, resolve
from secateur.pruning.run import Run
from secateur.ranks import in_turns, is_first, joined
from secateur.report.measured import Comparison, FoundCell
from secateur.store import Services, Store
from secateur.stream.device import on_device
from secateur.stream.losses import domain_losses

CELLS_FOLDER = "cells"
DENSE = "dense"


@dataclass(frozen=True, slots=True)
class _Bench:
    """What every cell needs: the model's files, the text's tokenizer, the tasks, the store."""

    study: Study
    opened: Opened
    checkpoint: Checkpoint
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    tasks: LoadedTasks | None
    store: Store
    progress: Progress

    def dense(self) -> PreTrainedModel:
        """Return the dense model, read anew, on the study's device."""
        return on_device(load_model(self.checkpoint), self.opened.device)


@joined()
def compare(
    study: Study | Path | str,
    out: Path | str,
    *,
    model: str | None = None,
    small: bool = False,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run what is missing of a study's grid; write `table.md`, `study.yaml`, `results.json`, `report.html` to `out`.

    `study`: a YAML file, or the name of a shipped study: paper, methods, tokens. `out`: the directory, which keeps
    every finished cell. `model`: in place of the study's own. `small`: the study's short form. `progress`: called with
    (stage, done, total). `tell`: gets a line of text about every finished cell that is damaged on disk and run again.

    Returns the `Comparison` that results.json holds. Under torchrun or `accelerate launch` every process calls this;
    the ranks take whole cells by turns, each as one process would run it, and the first one writes.

    Raises a SecateurError, one sentence, for everything that a user can correct; a ratio out of a method's reach
    surfaces before the first cell runs.
    """
    if not isinstance(study, Study):
        study = load_study(str(study), small=small, model=model)
    return _compare(study, Path(out), progress if is_first() else silent, tell)


def _compare(study: Study, out: Path, progress: Progress, tell: Callable[[str], None]) -> Comparison:
    grid = list(cells(study))
    opened = open_model(study.model, study_recipe(study, study.seeds[0]))
    for cell in grid:
        resolve(checked(opened.asking(cell.recipe)))
    evaluation = study.evaluation
    tasks = load_tasks(evaluation.tasks, TaskOptions(limit=evaluation.limit), None) if evaluation.tasks else None
    tokenizer, checkpoint = tokenizer_of(opened), opened.checkpoint
    assert checkpoint is not None, "a study names its model"
    store = Store(out / CELLS_FOLDER, tell=tell)
    with disk_errors(out):
        (out / CELLS_FOLDER).mkdir(parents=True, exist_ok=True)
    bench = _Bench(study, opened, checkpoint, fingerprint(checkpoint), tokenizer, tasks, store, progress)
    blocks: dict[int, dict[str, Tensor]] = {}
    work: list[int | Cell] = []
    for seed in study.seeds:
        work += [seed, *(cell for cell in grid if cell.seed == seed)]
    progress("cells", 0, len(work))

    def found_cell(number: int) -> FoundCell:
        cell = work[number]
        seed = cell if isinstance(cell, int) else cell.seed
        if seed not in blocks:
            blocks[seed] = _judged_on(bench, resolve(checked(opened.asking(study_recipe(study, seed)))), seed)
        of_dense = isinstance(cell, int)
        found = _dense_cell(bench, cell, blocks[seed]) if of_dense else _cell(bench, cell, blocks[seed])
        progress("cells", number + 1, len(work))
        return found

    found = in_turns(found_cell, list(range(len(work))))
    comparison = Comparison(tuple(found), versions())
    if is_first():
        texts = {"study.yaml": dump_study(study), "results.json": comparison.to_json()}
        for name, text in (texts | comparison_files(study, found)).items():
            with staged_file(out / name, overwrite=True) as staged:
                staged.write_text(text, encoding="utf-8")
    return comparison


def _judged_on(bench: _Bench, resolved: Resolved, seed: int) -> dict[str, Tensor]:
    """Return the blocks per domain that the seed's cells are judged on: the first of those held out."""
    samples = any(domain.sampled for domain in resolved.recipe.calibration.domains.values())
    drawn = _draw(bench, resolved, seed, bench.dense() if samples else None)
    return {domain.name: domain.held_out_NT[: bench.study.evaluation.num_blocks] for domain in drawn.domains}


def _draw(bench: _Bench, resolved: Resolved, seed: int, model: PreTrainedModel | None) -> CalibrationSet:
    """Return the recipe's calibration set; `model` is the dense one, needed where a domain is sampled from it."""
    recipe, more = resolved.recipe, bench.study.evaluation.num_blocks
    drawn = build_calibration(
        recipe.calibration,
        resolved.num_tokens,
        bench.tokenizer,
        seed,
        more_held_out=more,
        num_rounds=recipe.choose.rounds,
    )
    return drawn if model is None else with_sampled(drawn, model, bench.tokenizer, seed, bench.progress)


def _dense_cell(bench: _Bench, seed: int, blocks: dict[str, Tensor]) -> FoundCell:
    def compute() -> dict[str, Any]:
        return {"remove_reached": 0.0, "seconds": 0.0} | _judge(bench, bench.dense(), bench.opened.arch, blocks)

    depends_on = _depends_on(bench, seed, {}, blocks)
    result = bench.store.value(f"{DENSE}-{seed}", compute, depends_on=depends_on)
    return FoundCell(DENSE, 0.0, seed, **result)


def _cell(bench: _Bench, cell: Cell, blocks: dict[str, Tensor]) -> FoundCell:
    def compute() -> dict[str, Any]:
        model, resolved = bench.dense(), resolve(bench.opened.asking(cell.recipe))
        num_params = Size.of(model).num_params
        text = _without_judged(_draw(bench, resolved, cell.seed, model), bench.study.evaluation.num_blocks)
        start, services = time.perf_counter(), Services(progress=bench.progress)
        run = Run(model=model, arch=bench.opened.arch, resolved=resolved, text=text, services=services)
        run = remove_depth(run)
        prune_in_place(run)
        seconds = time.perf_counter() - start
        reached = 1 - Size.of(model).num_params / num_params
        num_tokens = {domain.name: domain.calibration_NT.numel() for domain in text.domains}
        facts = {"remove_reached": reached, "seconds": seconds, "num_tokens": num_tokens}
        return facts | _judge(bench, model, run.arch, blocks)

    depends_on = _depends_on(bench, cell.seed, cell.recipe.model_dump(mode="json"), blocks)
    name = f"{cell.method}-{cell.ratio:g}-{cell.seed}"
    result = bench.store.value(name, compute, depends_on=depends_on)
    return FoundCell(cell.method, cell.ratio, cell.seed, **result)


def _without_judged(drawn: CalibrationSet, num_blocks: int) -> CalibrationSet:
    """Leave the guard only those held-out blocks that no cell is judged on."""
    domains = (dataclasses.replace(domain, held_out_NT=domain.held_out_NT[num_blocks:]) for domain in drawn.domains)
    return dataclasses.replace(drawn, domains=tuple(domains))


def _depends_on(bench: _Bench, seed: int, recipe: dict[str, Any], blocks: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "model": bench.fingerprint,
        "recipe": recipe,
        "seed": seed,
        "device": bench.opened.device.type,
        "evaluation": bench.study.evaluation.model_dump(mode="json"),
        "judged_on": {name: int(ids_NT.sum()) for name, ids_NT in blocks.items()},
        "versions": versions(),
    }


def _judge(bench: _Bench, model: PreTrainedModel, arch: Arch, blocks: dict[str, Tensor]) -> dict[str, Any]:
    losses = domain_losses(model, arch, blocks, bench.progress)
    evaluation, tasks = bench.study.evaluation, {}
    for name, task in (bench.tasks.tasks if bench.tasks else {}).items():
        options = TaskOptions(limit=evaluation.limit, batch_size=evaluation.batch_size)
        found = run_task(task, model, bench.tokenizer, options, partial(bench.progress, name))
        tasks[name] = {key: value for key, value in found["results"][name].items() if isinstance(value, int | float)}
    return {"nats_per_token": {name: loss.nats_per_token for name, loss in losses.items()}, "tasks": tasks}
