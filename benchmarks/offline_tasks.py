"""Compare tasks without the hub with the harness alone, question by question.

Each task runs twice: as `secateur evaluate --tasks` runs it, and by the harness alone, which loads
the same rows from parquet files and loads the model itself. Prints a Markdown row per task. Exits
with 1 unless every question is scored the same.

    HF_HUB_OFFLINE=1 python benchmarks/offline_tasks.py MODEL TASKS_DATA [--limit 100] [--batch-size 8]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.models.huggingface import HFLM

from secateur.evaluation.tasks import TaskOptions, load_tasks, quiet_harness, run_task, task_manager
from secateur.model.checkpoint import load_model, load_tokenizer, open_checkpoint
from secateur.report.records import task_metrics

TASKS = "arc_easy,winogrande,copa,hellaswag,piqa"
SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}


def harness_alone(task: Any, lm: Any, options: TaskOptions, directory: Path) -> dict[str, Any]:
    """Return results and scores by question; only the location of the task's rows is changed."""
    rows = datasets.load_from_disk(directory / task.config.dataset_path / (task.config.dataset_name or "default"))
    with tempfile.TemporaryDirectory() as scratch, quiet_harness():
        files = {split: str(Path(scratch, f"{split}.parquet")) for split in rows}
        for split, file in files.items():
            rows[split].to_parquet(file)
        where = {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        absent = {key: None for key, split in SPLITS.items() if split not in files}
        found: Any = lm_eval.simple_evaluate(
            model=lm,
            tasks=[{"group": "alone", "task": [{"task": task.task_name, **where, **absent}]}],
            limit=options.limit,
            task_manager=task_manager(),
        )
    samples = found["samples"][task.task_name]
    scores = {f"{metric},none": [sample[metric] for sample in samples] for metric in samples[0]["metrics"]}
    return {"results": found["results"][task.task_name], "item_scores": scores}


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _scores(results: dict[str, Any]) -> str:
    return ", ".join(f"{metric.removesuffix(',none')} {results[metric]:.4f}" for metric in task_metrics(results))


def main() -> int:
    """Print a row per task; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tasks_data", type=Path)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    options = TaskOptions(limit=arguments.limit, batch_size=arguments.batch_size)
    checkpoint = open_checkpoint(arguments.model)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    with quiet_harness():
        alone = HFLM(pretrained=arguments.model, device="cpu", batch_size=options.batch_size)
    loaded = load_tasks(tuple(arguments.tasks.split(",")), options, arguments.tasks_data)
    all_equal = True
    print(_row("task", "questions", "secateur", "the harness alone", "every question equal", "seconds each"))
    print(_row(*["---"] * 6))
    for name, task in loaded.tasks.items():
        start = time.perf_counter()
        ours = run_task(task, model, tokenizer, options, lambda done, total: None)
        middle = time.perf_counter()
        theirs = harness_alone(task, alone, options, arguments.tasks_data)
        seconds = f"{middle - start:.0f}, {time.perf_counter() - middle:.0f}"
        equal = ours["item_scores"] == theirs["item_scores"] and ours["results"][name] == theirs["results"]
        all_equal &= equal
        shown = _scores(ours["results"][name]), _scores(theirs["results"])
        num_questions = len(next(iter(ours["item_scores"].values())))
        print(_row(name, num_questions, *shown, "yes" if equal else "NO", seconds), flush=True)
    return 0 if all_equal else 1


if __name__ == "__main__":
    sys.exit(main())
