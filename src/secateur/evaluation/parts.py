"""The parts of an evaluation: a domain, KL on a domain, a task; each computed once.

In: one or two models, known by their files' fingerprint and loaded on demand. Out: plain numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.blocks import Blocks, Text
from secateur.evaluation.tasks import (
    LoadedTasks,
    merged_results,
    num_questions,
    run_task,
    task_identity,
)
from secateur.facts import Judgement, Verdicts, standard_error
from secateur.log import Progress, versions
from secateur.model.bind import Arch, bind
from secateur.model.checkpoint import (
    Checkpoint,
    fingerprint,
    load_model,
    load_tokenizer,
    meta_model,
    open_checkpoint,
)
from secateur.model.modules import text_model
from secateur.ranks import device_called, in_turns
from secateur.recovery.judge import Judge
from secateur.report.records import (
    Differences,
    Measured,
    Quality,
    Scores,
    TaskResults,
    TaskScore,
    change,
    task_metrics,
)
from secateur.store import Store
from secateur.stream.device import on_device
from secateur.stream.judge import OTHER, ToJudge, digest_of
from secateur.vocabulary.kept import KeptTokens, keep_tokens
from secateur.vocabulary.tokenizer import num_bytes

# What a conversation may have; how many are asked at a time follows from it.
SPEAKER_TOKENS = 512


def measured_by(
    scores: Judgement,
    text: Mapping[str, Text],
    tokenizer: PreTrainedTokenizerBase,
    harness: dict[str, Any],
) -> Measured:
    """Return what was measured of one model."""
    losses = {**scores.domains, OTHER: scores.other}
    sizes = {name: num_bytes(tokenizer, [block.ids_T for block in text[name]]) for name in losses}
    qualities = {name: Quality.on(sizes[name], loss) for name, loss in losses.items()}
    other = qualities.pop(OTHER)
    results = None
    if harness:
        # The parts save the thousands of scores by question; evaluation.json leaves them out.
        more = {key: value for key, value in harness.items() if key != "item_scores"}
        results = TaskResults(
            more.pop("results"), more.pop("sources"), more.pop("lm_eval_version"), more
        )
    return Measured(qualities, other, results)


def differences(dense: Measured, pruned: Measured, tasks: Scores | None) -> Differences:
    """Return the differences on text, in nats per token, together with those of `tasks`."""
    domains = {
        domain: change(dense.domains[domain], part) for domain, part in pruned.domains.items()
    }
    return Differences(domains, change(dense.other_text, pruned.other_text), tasks)


def task_changes(dense: dict[str, Any], pruned: dict[str, Any]) -> Scores:
    """Return the differences by task and metric. In: `task_parts` of each model."""
    return {
        name: {
            metric: _task_change(name, metric, dense, pruned) for metric in task_metrics(results)
        }
        for name, results in pruned["results"].items()
    }


def _task_change(
    name: str, metric: str, dense: dict[str, Any], pruned: dict[str, Any]
) -> TaskScore:
    before, after = dense["results"][name][metric], pruned["results"][name][metric]
    old, new = (side["item_scores"].get(name, {}).get(metric, []) for side in (dense, pruned))
    error = None
    if _is_mean(old, before) and _is_mean(new, after):
        gains = [b - a for a, b in zip(old, new, strict=True)]
        error = standard_error(gains, [1] * len(gains))
    return TaskScore(after - before, error)


def _is_mean(scores: list[Any], value: float) -> bool:
    if not scores or not all(isinstance(score, int | float) for score in scores):
        return False
    return math.isclose(sum(scores) / len(scores), value, rel_tol=1e-9, abs_tol=1e-12)


@dataclass(slots=True)
class Subject:
    """A model to judge. `which`: its name in progress bars. `device`: where it is loaded.

    `kept`: the only tokens that it has once it is loaded; None for all of its own. `fingerprint`:
    of its files, if it is known.
    """

    which: str
    checkpoint: Checkpoint
    arch: Arch
    device: torch.device
    loaded: PreTrainedModel | None = None
    kept: KeptTokens | None = None
    fingerprint: str = ""

    def __post_init__(self) -> None:
        self.fingerprint = self.fingerprint or fingerprint(self.checkpoint)

    @property
    def facts(self) -> dict[str, Any]:
        """What its figures depend on, beside the text."""
        return {"model": self.fingerprint, "device": self.device.type, "versions": versions()}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, read anew."""
        return load_tokenizer(self.checkpoint)

    def model(self) -> PreTrainedModel:
        """Return the model, loading it at the first call."""
        if self.loaded is None:
            self.loaded = self.load()
        return self.loaded

    def load(self) -> PreTrainedModel:
        """Return the model, read anew, on the device."""
        model = on_device(load_model(self.checkpoint), self.device)
        if self.kept is not None:
            keep_tokens(model, self.kept)
        return model

    def to_judge(self) -> ToJudge:
        """Return the model for a judge."""
        return ToJudge(self.which, lambda: (self.model(), self.arch), SPEAKER_TOKENS, self.facts)

    def keep(self, kept: KeptTokens) -> None:
        """Leave it the kept tokens alone, which then are its words, under their new ids."""
        self.kept = kept
        if self.loaded is not None:
            keep_tokens(self.loaded, kept)

    def forget(self) -> None:
        """Free the model's memory."""
        self.loaded = None


def open_subject(which: str, reference: Any, device: str | None) -> Subject:
    """Check a model without its weights. Raises CheckpointError, ArchError or RecipeError."""
    checkpoint = open_checkpoint(reference)
    return Subject(which, checkpoint, bind(meta_model(checkpoint.config)), device_called(device))


def task_parts(
    store: Store,
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedTasks,
    progress: Progress,
) -> dict[str, Any]:
    """Return the tasks' results in the harness's shape, plus `sources` and `item_scores` by task;
    none without tasks.

    Ranks take whole tasks by turns, so each task is asked as by one process.
    """
    if not loaded.tasks:
        return {}
    options = loaded.options
    sizes = {name: num_questions(task, options) for name, task in loaded.tasks.items()}
    stage, num_done, num_all = f"{subject.which}: questions of tasks", 0, sum(sizes.values())
    progress(stage, 0, num_all)

    def result_of(name: str) -> dict[str, Any]:
        nonlocal num_done
        before, task = num_done, loaded.tasks[name]

        def listen(done: int, total: int) -> None:
            progress(stage, before + sizes[name] * done // total, num_all)

        def compute() -> dict[str, Any]:
            return run_task(task, subject.model(), tokenizer, options, listen)

        depends_on = {
            **subject.facts,
            **dataclasses.asdict(options),
            **task_identity(task, loaded, tokenizer),
        }
        outcome = store.value(f"task-{name}", compute, depends_on=depends_on)
        num_done += sizes[name]
        progress(stage, num_done, num_all)
        return outcome

    names = list(loaded.tasks)
    results = dict(zip(names, in_turns(result_of, names), strict=True))
    item_scores = {name: result["item_scores"] for name, result in results.items()}
    return {
        **merged_results(list(results.values()), loaded),
        "sources": loaded.sources,
        "item_scores": item_scores,
    }


def judge_of_kl(
    store: Store, dense: Subject, pruned: Subject, text: Mapping[str, Blocks], progress: Progress
) -> Callable[[], Verdicts]:
    """Return what gives KL(dense || pruned) by domain when the dense model, which is asked here, is
    gone.
    """
    depends_on = {
        "dense": dense.facts,
        "pruned": pruned.facts,
        "text": [digest_of(blocks) for blocks in text.values()],
    }
    judge = None
    if text and not store.has("kl", depends_on):
        judge = Judge(dense.model(), dense.arch, text, progress)

    def logits(ids_BT: Tensor) -> Tensor:
        model = pruned.model()
        return text_model(model)(input_ids=ids_BT.to(model.device), use_cache=False).logits

    def measured() -> Verdicts:
        return {} if judge is None else judge.verdicts(logits)

    return partial(store.value, "kl", measured, kind=Verdicts, depends_on=depends_on)
