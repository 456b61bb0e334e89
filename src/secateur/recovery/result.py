"""What a recovery writes, and the benchmark tasks that it asks the dense, the pruned and the recovered model."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.evaluation.parts import open_subject, task_changes, task_parts
from secateur.evaluation.tasks import LoadedTasks, TaskOptions, load_tasks
from secateur.formats.save import save_checkpoint
from secateur.log import LOG_FILE, Progress
from secateur.recipe import Recipe, TaskSettings
from secateur.recipe_file import dump_recipe
from secateur.report.measured import BENCH_FILE, RECOVERY_FILE, RecoveryRecord, TaskScore, TaskScores, task_scores
from secateur.report.records import RESULT_FILE
from secateur.report.rows_measured import recovery_card
from secateur.store import Store

# What stays true of the model: which units it has, how it was pruned, how fast it is.
CARRIED = ("keep.json", RESULT_FILE, BENCH_FILE)
CARD, HOW_MADE = "README.md", "\n## How it was made\n"


def save_recovered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, source: Path, directory: Path
) -> None:
    """Write weights, configs, tokenizer, the recipe, and what is carried over from `source`."""
    save_checkpoint(model, tokenizer, directory, max_shard_size=recipe.output.max_shard_size, carry_from=source)
    (directory / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def write_record(record: RecoveryRecord, lines: Iterable[dict[str, Any]], source: Path, directory: Path) -> None:
    """Write recovery.json, continue the run log, and add to the model card."""
    (directory / RECOVERY_FILE).write_text(record.to_json(), encoding="utf-8")
    log = source / LOG_FILE
    earlier = log.read_text(encoding="utf-8") if log.is_file() else ""
    added = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / LOG_FILE).write_text(earlier + added, encoding="utf-8")
    card = source / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {record.pruned}, recovered by secateur\n"
    before, heading, after = text.partition(HOW_MADE)
    (directory / CARD).write_text(f"{before.rstrip()}\n\n{recovery_card(record)}{heading}{after}", encoding="utf-8")


def last_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines without those that a restart wrote again: of one event and place the last one counts."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        key = (line["event"], line.get("step"), line.get("text"))
        found[key] = line
    return list(found.values())


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
