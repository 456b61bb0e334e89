"""Benchmark tasks through lm-evaluation-harness itself, with or without the hub.

Rows of data sets come from the hub or from a directory. Code that a model wrote runs in a process
of its own that can do little harm: `code_child` has its limits.
"""

import hashlib
import io
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import RecipeError, advice, one_line
from secateur.model.stock import quiet_transformers, replaced


def saved_rows(folder: Path) -> dict[str, Any] | None:
    """Return the splits that `save_to_disk` of datasets wrote to a folder; None if there is
    none.
    """
    if not folder.is_dir():
        return None
    import datasets
    import pyarrow

    try:
        # In memory: otherwise the harness would write what it derives beside the files.
        splits: Any = datasets.load_from_disk(str(folder), keep_in_memory=True)
        return dict(splits)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = one_line(error)
        raise RecipeError(
            f"task data {folder}: cannot be read ({reason}); write or download it again."
        ) from None


CHILD = Path(__file__).with_name("code_child.py")
# Of a clock on the wall; the child also has a limit on its seconds of processor time.
MAX_SECONDS = 30


def passes(program: str, tests: str) -> bool:
    """Return whether `program` followed by `tests` runs to its end.

    The process has no network, little memory and time, and writes no file. A program that ends
    before its tests have run does not pass: only what runs to the end repeats a number that was
    drawn for it.
    """
    drawn = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="code-") as folder:
        try:
            child = subprocess.run(
                args=[sys.executable, "-I", "-S", "-B", str(CHILD), drawn],
                input=f"{program}\n{tests}\n",
                capture_output=True,
                cwd=folder,
                env={},
                encoding="utf-8",
                errors="replace",
                timeout=MAX_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False
    return child.returncode == 0 and child.stdout.endswith(drawn)


class CodeMetric:
    """Stands for the metric `code_eval`, which the harness's tasks ask the hub for."""

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1,),
    ) -> tuple[dict[str, float], dict[int, Any]]:
        """Return pass@1 over the problems: the mean share of a problem's candidates that pass.

        Raises ValueError for another `k`: tasks that sample many candidates are not run here.
        """
        if tuple(k) != (1,):
            raise ValueError(f"pass@k is measured for k = 1 alone, got {list(k)}")
        verdicts = [
            [passes(candidate, tests) for candidate in candidates]
            for tests, candidates in zip(references, predictions, strict=True)
        ]
        shares = [sum(verdict) / len(verdict) for verdict in verdicts]
        return {"pass@1": sum(shares) / len(shares)}, dict(enumerate(verdicts))


def load_metric(path: str, *_: Any, **__: Any) -> CodeMetric:
    """Return the metric that a task asks for, in place of `evaluate.load`. Raises ValueError for
    others.
    """
    if path != "code_eval":
        raise ValueError(f"the metric {path} is on the hub alone")
    return CodeMetric()


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence the harness inside the block. Raises RecipeError if it is not installed."""
    # DISABLE_MULTIPROC: resample for standard errors in this process.
    with (
        quiet_transformers(),
        redirect_stdout(io.StringIO()),
        replaced(os.environ, "DISABLE_MULTIPROC", "1"),
    ):
        try:
            import datasets
            import lm_eval.api.model
            import lm_eval.api.task
        except ImportError:
            raise RecipeError(
                "--tasks: needs lm-evaluation-harness; install secateur[evaluate]."
            ) from None
        logger = logging.getLogger("lm_eval")
        level, bars_were_off = logger.level, datasets.are_progress_bars_disabled()
        logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        try:
            api: Any = lm_eval.api
            with (
                replaced(vars(api.model), "tqdm", NO_BAR),
                replaced(vars(api.task), "tqdm", NO_BAR),
            ):
                yield
        finally:
            logger.setLevel(level)
            if not bars_were_off:
                datasets.enable_progress_bars()


class Bar:
    """Stands for tqdm in the harness: draws nothing, and tells `progress` of each request that is
    done.
    """

    def __init__(
        self,
        progress: Callable[[int, int], None],
        items: Iterable[Any] = (),
        total: int = 0,
        **_: Any,
    ) -> None:
        self.progress, self.items, self.total, self.done = progress, items, total, 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def update(self, num: int = 1) -> None:
        """Count what is done."""
        self.done += num
        self.progress(self.done, self.total)

    def close(self) -> None:
        """Leave nothing behind."""


NO_BAR = partial(Bar, lambda done, total: None)


@cache
def task_manager() -> Any:
    """Return the harness's index of task files; reading them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


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
    """The harness's objects by name, and how they are asked; no tasks without names.

    `sources`: by task, where rows not from the hub came from.
    """

    options: TaskOptions
    tasks: dict[str, Any]
    groups: dict[str, Any]
    sources: dict[str, str]


class _Splits(dict[str, Any]):
    """A data set's splits; a missing split of few-shot examples is empty.

    The harness asks for it even if no example is wanted; `_check_examples` checks the rest.
    """

    def __init__(self, splits: dict[str, Any], task: str) -> None:
        super().__init__(splits)
        self._task = task

    def __missing__(self, split: str) -> Any:
        if split in FEW_SHOT_SPLITS:
            return next(iter(self.values())).select([])
        raise RecipeError(
            f"task {self._task}: its questions are the split '{split}', which its rows in "
            "--tasks-data do not have; give that split too, or go online without --tasks-data."
        )


def _rows(
    task: str,
    directory: Path | None,
    used: dict[tuple[str, str | None], str],
    hub: Callable[..., Any],
    path: str,
    name: str | None = None,
    **kwargs: Any,
) -> Any:
    """Return rows from the directory if they are there, and note that in `used`; else those of the
    hub.

    Stands for `datasets.load_dataset`, which is `hub`, while a task or group is loaded.
    """
    from datasets.exceptions import DatasetsError

    where = f"{path}/{name or 'default'}"
    splits = None if directory is None else saved_rows(directory / where)
    if splits is not None:
        used[path, name] = f"{where} in --tasks-data"
        return _Splits(splits, task)

    try:
        return hub(path=path, name=name, **kwargs)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = "HF_HUB_OFFLINE=1" if constants.HF_HUB_OFFLINE else one_line(error)
        raise RecipeError(
            f"task {task}: cannot load its data set {where} from the hub ({reason}); save it with "
            f"datasets' save_to_disk to DIR/{where} and give --tasks-data DIR."
        ) from None


def load_tasks(names: tuple[str, ...], options: TaskOptions, directory: Path | None) -> LoadedTasks:
    """Return the tasks with their rows; without names the harness is not needed. Groups and tags
    stand for their tasks.

    Raises RecipeError if the harness or rows are missing, or a task is unknown (naming the
    nearest).
    """
    loaded = LoadedTasks(options, {}, {}, {})
    if not names:
        return loaded
    with quiet_harness():
        import datasets
        import evaluate as metrics
        import nltk

        manager = task_manager()
        for name in names:
            if name not in manager.all_tasks:
                hint = advice(name, manager.all_tasks, "python -m lm_eval ls tasks lists them.")
                raise RecipeError(f"--tasks: unknown task '{name}'; {hint}")
            used: dict[tuple[str, str | None], str] = {}
            with (
                replaced(
                    vars(datasets),
                    "load_dataset",
                    partial(_rows, name, directory, used, datasets.load_dataset),
                ),
                replaced(vars(metrics), "load", load_metric),
                replaced(vars(nltk), "download", partial(_downloaded, name, nltk.download)),
            ):
                try:
                    found = manager.load(name)
                except ImportError as error:
                    raise RecipeError(
                        f"task {name}: needs the package {error.name}; install it."
                    ) from None
            loaded.tasks.update(found["tasks"])
            loaded.groups.update(found.get("groups", {}))
            for leaf, task in found["tasks"].items():
                if getattr(task.config, "unsafe_code", False) and not options.run_code:
                    raise RecipeError(
                        f"task {leaf}: runs code that the model writes, in a process without "
                        "network, of bounded memory and time; add --run-code to allow it."
                    )
                source = used.get((task.config.dataset_path, task.config.dataset_name))
                if source is not None:
                    _check_examples(task, options, source)
                    loaded.sources[leaf] = source
    return loaded


def _downloaded(name: str, download: Callable[..., Any], resource: str) -> None:
    """Get what a task needs of nltk, which itself says nothing if it cannot. Raises RecipeError
    then.
    """
    if constants.HF_HUB_OFFLINE or not download(resource):
        raise RecipeError(
            f"task {name}: needs nltk's {resource}; run: python -m nltk.downloader {resource}."
        )


def _check_examples(task: Any, options: TaskOptions, source: str) -> None:
    own = task.config.num_fewshot
    # The harness never changes a task's own 0.
    num_fewshot = own if own == 0 or options.num_fewshot is None else options.num_fewshot
    if num_fewshot and not list(task.fewshot_docs()):
        raise RecipeError(
            f"task {task.task_name}: its {num_fewshot} few-shot examples come from a split that "
            f"{source} does not have; give that split too by --tasks-data, go online, or use "
            "--num-fewshot 0."
        )


def _questions(task: Any) -> Any:
    """Return the questions; some tasks build them anew each time, with a progress bar."""
    with quiet_harness():
        return task.eval_docs


def num_questions(task: Any, options: TaskOptions) -> int:
    """Return how many questions are asked."""
    count = len(_questions(task))
    return min(options.limit or count, count)


def is_chat(task: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the task is asked through the chat template: one whose answers are written is,
    if there is one.
    """
    return task.OUTPUT_TYPE == "generate_until" and tokenizer.chat_template is not None


def task_identity(
    task: Any, loaded: LoadedTasks, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
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


FENCE, FINDER = "```", "extract_code_blocks"


@contextmanager
def _code_found(task: Any) -> Iterator[None]:
    """Let the harness find code that begins behind the fence which its tasks of MBPP open.

    It takes the first word there, mostly `def`, for the name of a language, so that nothing passes:
    EleutherAI/lm-evaluation-harness#3447.
    """
    modules = [
        getattr(step.get("filter_fn"), "__globals__", {})
        for pipeline in task.config.filter_list or ()
        for step in pipeline["filter"]
    ]
    names = next((names for names in modules if FINDER in names), None)
    if names is None:
        yield
        return
    find = names[FINDER]

    def code_in(answer: str) -> str:
        """Return the first code, by a finder that puts a fence before what it is given."""
        before, _, rest = answer.partition(FENCE)
        # A fence that names a language, or before which nothing stands, is the answer's own.
        return find(rest if rest[:1].isalpha() or not before.strip() else f"\n{answer}")

    with replaced(names, FINDER, code_in):
        yield


def run_task(
    task: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: TaskOptions,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Return the harness's result of one task, plus each question's score in `item_scores`."""
    with quiet_harness():
        import tqdm
        from lm_eval import evaluator
        from lm_eval.models import huggingface

        harness: Any = huggingface.HFLM
        run: Any = evaluator.simple_evaluate
        wrapper = harness(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
        _check_room(task, wrapper)
        # Without its report on machine and git commit.
        with (
            _code_found(task),
            replaced(vars(evaluator), "add_env_info", lambda storage: None),
            replaced(vars(evaluator), "get_git_commit_hash", lambda: None),
            replaced(vars(tqdm), "tqdm", NO_BAR),
            replaced(vars(huggingface), "tqdm", partial(Bar, progress)),
        ):
            outcome = run(
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
    result = {key: outcome[key] for key in BY_TASK}
    for config in result["configs"].values():
        config.get("metadata", {}).pop("config_source", None)  # a path of this machine
    scores: dict[str, list[Any]] = {}
    for sample in outcome["samples"][task.task_name]:
        for metric in sample["metrics"]:
            scores.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return {**result, "item_scores": scores}


def _check_room(task: Any, wrapper: Any) -> None:
    """Raise RecipeError if the model has too few positions for the answers that the task asks it to
    write.
    """
    if task.OUTPUT_TYPE != "generate_until":
        return
    num_written = (task.config.generation_kwargs or {}).get("max_gen_toks") or wrapper.max_gen_toks
    if num_written >= wrapper.max_length:
        raise RecipeError(
            f"task {task.task_name}: asks for answers of up to {num_written} tokens, and the model "
            f"has {wrapper.max_length} positions for question and answer; leave the task out."
        )


def merged_results(results: list[dict[str, Any]], loaded: LoadedTasks) -> dict[str, Any]:
    """Merge results by task into one in the harness's shape, with the averages of groups."""
    import lm_eval

    merged: dict[str, Any] = {key: {} for key in BY_TASK}
    for result in results:
        for key in BY_TASK:
            merged[key] |= result[key]
    averages = {name: group.aggregate(merged["results"]) for name, group in loaded.groups.items()}
    merged["results"] |= averages
    merged["groups"] = {
        name: averages[name] for name, group in loaded.groups.items() if group.has_aggregation
    }
    merged["group_subtasks"] = {name: group.child_names for name, group in loaded.groups.items()}
    merged["lm_eval_version"] = lm_eval.__version__
    return merged
