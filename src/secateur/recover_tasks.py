"""Benchmark tasks of a recovery: the dense model, the pruned one as it came, and the recovered one.

In: the checkpoints and the settings. Out: `TaskScores`. One model at a time is in memory, and every model's task is
kept in a directory as soon as it is done, so that an interrupted run does not ask it again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.evaluate_differences import task_changes
from secateur.evaluate_parts import open_subject, task_parts
from secateur.evaluate_tasks import LoadedTasks, TaskOptions, load_tasks
from secateur.measured import TaskScore, task_scores
from secateur.progress import Progress
from secateur.recover_recipe import TaskSettings
from secateur.recover_record import TaskScores
from secateur.store import Store

PARTS_FOLDER = "tasks"


def tasks_of(settings: TaskSettings, directory: Path | None) -> LoadedTasks | None:
    """Return the tasks with their rows, None where none are asked. Raises RecipeError as `evaluate` does."""
    return load_tasks(settings.tasks, _options(settings), directory) if settings.tasks else None


def score_tasks(
    loaded: LoadedTasks,
    settings: TaskSettings,
    places: dict[str, str | Path],
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    progress: Progress,
    tell: Callable[[str], None] = lambda text: None,
) -> TaskScores:
    """Return every model's scores. `places`: the models by `dense`, `pruned` and `recovered`. `tell`: see `Store`."""
    store = Store(scratch / PARTS_FOLDER, tell=tell)
    (scratch / PARTS_FOLDER).mkdir(exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for which, place in places.items():
        subject = open_subject(which, place)
        found[which] = task_parts(store, subject, tokenizer, loaded, _options(settings), progress)
        subject.forget()
    gains = task_changes(found["pruned"], found["recovered"])
    return TaskScores(
        **{which: task_scores(tasks["results"]) for which, tasks in found.items()},
        gains={
            task: {metric: TaskScore(gain.difference, gain.standard_error) for metric, gain in by_metric.items()}
            for task, by_metric in gains.items()
        },
        sources=loaded.sources,
        limit=settings.limit,
        lm_eval_version=found["recovered"]["lm_eval_version"],
        notes=loaded.notes,
    )


def _options(settings: TaskSettings) -> TaskOptions:
    return TaskOptions(limit=settings.limit, batch_size=settings.batch_size)
