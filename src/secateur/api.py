"""`prune`: a run, followed by recovery if the recipe asks for it. `recover`: that alone, with tasks.

`push`: the result to the hub. `table`: what a verb returned, as tables.
"""

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.evaluation.parts import recovered_scores
from secateur.evaluation.study import Comparison
from secateur.evaluation.study_page import comparison_table
from secateur.evaluation.tasks import TaskOptions, load_tasks
from secateur.files import remove_empty
from secateur.log import Progress, silent
from secateur.model.checkpoint import Tokenizer, load, open_checkpoint
from secateur.model.modules import CausalLM
from secateur.pruning.prune import prune_run
from secateur.pruning.result import Result, recipe_like
from secateur.ranks import is_first, joined, meet
from secateur.recipe import Recipe, TaskSettings
from secateur.recipe_file import as_recipe
from secateur.recovery import recover as recovery
from secateur.report.measured import BenchResult, Evaluation, RecoveryRecord
from secateur.report.push import push
from secateur.report.records import Inspection, Summary, read_summary
from secateur.report.report import write_pages, write_recovered_pages
from secateur.report.rows import Tables, inspection_table, summary_table
from secateur.report.rows_measured import bench_table, evaluation_table, recovery_table
from secateur.result_directory import check_replaceable
from secateur.store import place_beside

__all__ = ["Result", "prune", "push", "recover", "table"]


@joined()
def prune(
    model: CausalLM | str | Path,
    recipe: Recipe | dict[str, Any] | Path | str | None = None,
    *,
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
    """Prune a causal LM by a recipe; return it with what it cost and which units stayed.

    `model`: a local directory, a hub id, a `.gguf` file, `smollm2-135m`, or a model in memory. A
    model in memory needs `tokenizer` and is pruned in place. Its buffers that no checkpoint stores,
    such as rotary frequencies rounded by `.to(torch.bfloat16)`, are first computed anew; `warnings`
    in the summary say so.

    `recipe`: a Recipe, a mapping, a YAML file, or None for the defaults. `out`: the directory to
    write; it appears complete or not at all. `like`: a result whose units go here too, for a sibling
    of the model that was pruned there: its recipe holds, with the keys that `recipe` gives on top,
    and what stays is repaired and polished on this model. `resume`: continue an interrupted run of the same
    inputs, whose steps are in a hidden directory beside `out`. `tell`: gets a line about that, and
    one about what the run will do and how long it takes. `force`: write a trim of the vocabulary, too,
    that costs more than 0.5 nats per token or twice what was foretold. `command`: how to repeat the
    run, for the model card, which shows it as it is.

    Under torchrun every process calls this and gets the same model; the first one writes and
    verifies. With the recipe's key `recover`, model and directory are the recovered ones, and the
    figures are those of pruning.

    Raises a SecateurError, one sentence, for what a user can correct.
    """
    progress = progress if is_first() else silent
    parsed = as_recipe(recipe) if like is None else recipe_like(Path(like), as_recipe(recipe))
    options = {
        "like": like,
        "tokenizer": tokenizer,
        "resume": resume,
        "force": force,
        "command": command,
        "progress": progress,
        "tell": tell,
    }
    if parsed.recover is None:
        return prune_run(model, parsed, finish=write_pages, out=out, overwrite=overwrite, **options)
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
    polish = {"num_tokens": recipe.polish.num_tokens or 0}  # by default one training is enough
    pruned, without = folder / "pruned", recipe.filled(polish=polish).model_copy(update={"recover": None})
    try:
        # overwrite: a killed run may have left it.
        result = prune_run(model, without, finish=write_pages, out=pruned, overwrite=True, **options)
        meet("pruned")  # the first rank is still saving
        assert recipe.recover is not None
        changes = {"recover": recipe.recover.model_dump(mode="json")}
        settings: dict[str, Any] = {key: options[key] for key in ("command", "progress", "tell")}
        settings["name"] = f"{result.summary.model}, pruned"
        recover(pruned, model, changes, out=place, overwrite=overwrite, **settings)
        meet("recovered")
    finally:
        if is_first() and not place_beside(pruned).exists():
            shutil.rmtree(pruned, ignore_errors=True)
            remove_empty([folder])
    return dataclasses.replace(result, model=load(place), recipe=recipe, summary=read_summary(place), out=out)


def recover(
    pruned: str | Path,
    teacher: str | Path,
    recipe: dict[str, Any] | Path | str | None = None,
    *,
    out: str | Path,
    tokens: int | None = None,
    overwrite: bool = False,
    other_dense: bool = False,
    command: str = "",
    name: str | None = None,
    tasks_data: Path | None = None,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> RecoveryRecord | None:
    """Train `pruned` to win back what pruning took from the dense `teacher`; write it to `out`.

    `recipe`: changes to the recipe.yaml of `pruned`, as keys or a YAML file. Its key `recover` says
    how to train, on how many tokens, and which tasks are asked before and after.
    `tokens`: to train on, all domains together. `overwrite`: replace `out` if it is a result.
    `other_dense`: the teacher is meant to be another model than `pruned` was pruned from.
    `command`: how to repeat the run, for the model card. `name`: what to call `pruned`.
    `tasks_data`: a directory where rows of tasks are looked for first. `progress`: called with
    (stage, done, total). `tell`: gets lines of text, at every evaluation and of interrupted runs.

    Returns the `RecoveryRecord` that recovery.json holds. The result is never worse: if what
    the training minimises did not fall on held-out text, the old weights are written, and a note
    says so.
    Under torchrun or `accelerate launch` every process calls this; the first one writes, the others
    return None.

    Raises a SecateurError, one sentence, for everything that a user can correct: RecipeError for
    the recipe and for missing packages, CheckpointError for models that do not fit each other.
    """

    def scorer(asked: TaskSettings) -> recovery.Scorer | None:
        options = TaskOptions(limit=asked.limit, batch_size=asked.batch_size)
        tasks = load_tasks(asked.tasks, options, tasks_data) if asked.tasks else None
        return None if tasks is None else partial(recovered_scores, tasks, options)

    options: dict[str, Any] = {"tokens": tokens, "overwrite": overwrite, "command": command, "name": name}
    options |= {"scorer": scorer, "other_dense": other_dense, "progress": progress, "tell": tell}
    return recovery.recover(pruned, teacher, recipe, out=out, finish=write_recovered_pages, **options)


_TABLES: dict[type, Callable[[Any], Tables]] = {
    Summary: summary_table,
    Inspection: inspection_table,
    Evaluation: evaluation_table,
    BenchResult: bench_table,
    RecoveryRecord: recovery_table,
    Comparison: comparison_table,
}


def table(result: Any) -> Tables:
    """Return the tables that the command line prints of a result; a notebook draws them.

    `result`: what `prune`, `inspect`, `evaluate`, `bench`, `recover` or `compare` returned. Raises
    RecipeError for anything else.
    """
    record = result.summary if isinstance(result, Result) else result
    kind = next((kind for kind in _TABLES if isinstance(record, kind)), None)
    if kind is None:
        raise RecipeError(
            f"table: takes what prune, inspect, evaluate, bench, recover or compare returned, got {record!r}."
        )
    return _TABLES[kind](record)
