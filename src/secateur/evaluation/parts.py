"""The parts of an evaluation: a domain, WikiText-2, KL on a domain, a task; each computed once.

In: one or two models, known by their files' fingerprint and loaded on demand. Out: plain numbers.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.answers import Speaker
from secateur.data.blocks import Block, Text, blocks_of
from secateur.evaluation.tasks import LoadedTasks, TaskOptions, identity, merge, num_questions, run_task
from secateur.evaluation.text import continuation, measure_quality
from secateur.facts import standard_error
from secateur.log import Progress, versions
from secateur.model.bind import Arch, bind, head_of
from secateur.model.checkpoint import Checkpoint, fingerprint, load_model, meta_model, open_checkpoint
from secateur.model.kept_tokens import KeptTokens, keep_tokens
from secateur.ranks import device_called, from_first, in_turns, own_part, size, spread
from secateur.report.measured import (
    Differences,
    Measured,
    TaskChange,
    change,
    task_metrics,
)
from secateur.store import Store
from secateur.stream import losses
from secateur.stream.device import on_device
from secateur.stream.own_answers import ANSWER_TOKENS, AnswerSheet, OwnAnswers, ask, judge, judging_prompts

Part = dict[str, Any]
# What a conversation may have; how many are asked at a time follows from it.
SPEAKER_TOKENS = 512


def differences(dense: Measured, pruned: Measured, tasks: dict[str, dict[str, TaskChange]] | None) -> Differences:
    """Return the differences on text, in nats per token, together with those of `tasks`."""
    before, after = dense.wikitext2, pruned.wikitext2
    wikitext2 = None if before is None or after is None else change(before, after)
    domains = {domain: change(dense.domains[domain], part) for domain, part in pruned.domains.items()}
    return Differences(domains, wikitext2, tasks)


def task_changes(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, dict[str, TaskChange]]:
    """Return the differences by task and metric. In: `task_parts` of each model."""
    return {
        name: {metric: _task_change(name, metric, dense, pruned) for metric in task_metrics(results)}
        for name, results in pruned["results"].items()
    }


def _task_change(name: str, metric: str, dense: dict[str, Any], pruned: dict[str, Any]) -> TaskChange:
    before, after = dense["results"][name][metric], pruned["results"][name][metric]
    old, new = (side["item_scores"].get(name, {}).get(metric, []) for side in (dense, pruned))
    paired = _is_mean(old, before) and _is_mean(new, after)
    error = standard_error([b - a for a, b in zip(old, new, strict=True)], [1] * len(old)) if paired else None
    return TaskChange(after - before, error)


def _is_mean(scores: list[Any], value: float) -> bool:
    numbers = all(isinstance(score, int | float) for score in scores)
    return bool(scores) and numbers and math.isclose(sum(scores) / len(scores), value, rel_tol=1e-9, abs_tol=1e-12)


@dataclass(slots=True)
class Subject:
    """A model to judge. `which`: its name in progress bars. `device`: where it is loaded.

    `kept`: the only tokens that it has once it is loaded; None for all of its own.
    """

    which: str
    checkpoint: Checkpoint
    arch: Arch
    fingerprint: str
    device: torch.device
    loaded: PreTrainedModel | None = None
    kept: KeptTokens | None = None

    @property
    def facts(self) -> Part:
        """What its figures depend on, beside the text."""
        return {"model": self.fingerprint, "device": self.device.type, "versions": versions()}

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

    def keep(self, kept: KeptTokens) -> None:
        """Leave it the kept tokens alone, which then are its words, under their new ids."""
        self.kept = kept
        if self.loaded is not None:
            keep_tokens(self.loaded, kept)

    def forget(self) -> None:
        """Free the model's memory."""
        self.loaded = None


def open_subject(which: str, reference: Any, device: str | None = None) -> Subject:
    """Check a model without its weights. Raises CheckpointError, ArchError or RecipeError."""
    checkpoint = open_checkpoint(reference)
    return subject_of(which, checkpoint, bind(meta_model(checkpoint.config)), device_called(device))


def subject_of(which: str, checkpoint: Checkpoint, arch: Arch, device: torch.device) -> Subject:
    """Return the subject of a checkpoint whose architecture is bound."""
    return Subject(which, checkpoint, arch, fingerprint(checkpoint), device)


@dataclass(slots=True)
class _Count:
    """Steps done of a stage, including those of an earlier evaluation."""

    progress: Progress
    stage: str
    total: int
    done: int = 0

    def move(self, num_steps: int = 1) -> None:
        """Advance by some steps and report it."""
        self.done = min(self.done + num_steps, self.total)
        self.progress(self.stage, self.done, self.total)


def quality_parts(
    store: Store,
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    stage: str,
    text: Mapping[str, Text],
    progress: Progress,
    num_tokens: dict[str, dict[int, int]] | None = None,
) -> dict[str, Part]:
    """Return `Quality` as a mapping, by domain. `num_tokens`: as in `measure_quality`, by domain."""
    count = _Count(progress, f"{subject.which}: {stage}", _num_blocks(text))
    count.move(0)
    found = {}
    for domain, blocks in text.items():
        before, counts = count.done, None if num_tokens is None else num_tokens[domain]

        def compute(domain: str = domain, blocks: Text = blocks, counts: dict[int, int] | None = counts) -> Part:
            done = partial(count.move, size())  # ranks have equally many, plus or minus one
            quality = measure_quality(subject.model(), subject.arch, tokenizer, domain, blocks, done, counts)
            return dataclasses.asdict(quality)

        depends_on = {**subject.facts, **_facts(blocks), **({"per": list(counts.items())} if counts else {})}
        found[domain] = store.value(f"{stage}-{domain}", compute, depends_on=depends_on)
        count.move(before + len(blocks) - count.done)
    return found


def sample_parts(
    store: Store,
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    starts: Mapping[str, str],
    progress: Progress,
) -> dict[str, str]:
    """Return what the model writes after each start, by domain; the first rank writes."""
    count = _Count(progress, f"{subject.which}: sample of text", len(starts))
    count.move(0)

    def write() -> dict[str, str]:
        written = {}
        for domain, start in starts.items():
            written[domain] = continuation(subject.model(), tokenizer, start)
            count.move()
        return written

    depends_on = {**subject.facts, "starts": dict(starts)}
    return store.value("samples", lambda: from_first(write), depends_on=depends_on)


def answer_sheet(
    store: Store, dense: Subject, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> AnswerSheet | None:
    """Return what the dense model answers; None without a chat template."""
    if tokenizer.chat_template is None:
        return None
    prompts = judging_prompts()
    depends_on = {**dense.facts, "prompts": list(prompts), "tokens": ANSWER_TOKENS}

    def written() -> Part:
        return ask(_speaker(dense, tokenizer), prompts, progress, once=from_first).plain()

    return AnswerSheet.of(prompts, store.value("answers", written, depends_on=depends_on))


def answer_parts(
    store: Store,
    sheet: AnswerSheet,
    pruned: Subject,
    tokenizer: PreTrainedTokenizerBase,
    dense_tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> OwnAnswers:
    """Return how the pruned model stands to the sheet. `dense_tokenizer`: the same object if nothing was trimmed."""
    depends_on = {**pruned.facts, "sheet": hashlib.sha256(str(sheet.plain()).encode()).hexdigest()}

    def stood() -> Part:
        return dataclasses.asdict(judge(_speaker(pruned, tokenizer), sheet, dense_tokenizer, progress, once=from_first))

    return OwnAnswers.of(store.value("own-answers", stood, depends_on=depends_on))


def _speaker(subject: Subject, tokenizer: PreTrainedTokenizerBase) -> Speaker:
    return Speaker(model=subject.model(), arch=subject.arch, tokenizer=tokenizer, seed="", length=SPEAKER_TOKENS)


def dense_states(
    store: Store, dense: Subject, pruned: Subject, text: Mapping[str, Text], progress: Progress
) -> losses.DenseStates | None:
    """Return the dense model's part of KL on this rank's blocks; None if every KL is known."""
    unknown = {
        domain: blocks_of(blocks)
        for domain, blocks in text.items()
        if not store.has(f"kl-{domain}", _kl_facts(dense, pruned, blocks))
    }
    if not unknown:
        return None
    count = _Count(progress, "dense: states for KL", _num_blocks(unknown))
    states: dict[str, list[Tensor]] = {}
    for domain, blocks in unknown.items():
        states[domain] = []
        for block in own_part(blocks):
            states[domain].append(losses.final_states(dense.model(), dense.arch, block.ids_T[None]))
            count.move(size())
    return losses.DenseStates(head_of(dense.model(), dense.arch), states)


def kl_parts(
    store: Store,
    dense: Subject,
    pruned: Subject,
    states: losses.DenseStates | None,
    text: Mapping[str, Text],
    progress: Progress,
) -> dict[str, Part]:
    """Return `Divergence` as a mapping, by domain. `states`: for domains without a known KL."""
    count = _Count(progress, "KL(dense || pruned)", _num_blocks(text))
    found = {}
    for domain, blocks in text.items():

        def compute(domain: str = domain, blocks: Text = blocks) -> Part:
            assert states is not None
            dense_head, own_states = states.head, iter(states.states_NPD[domain])
            head = head_of(pruned.model(), pruned.arch)

            def compare(block: Block) -> tuple[Tensor, Tensor]:
                pruned_PD = losses.final_states(pruned.model(), pruned.arch, block.ids_T[None])
                return losses.compare_tokens(next(own_states), dense_head, pruned_PD, head)

            compared = [list(parts) for parts in zip(*spread(compare, blocks_of(blocks)), strict=True)]
            return dataclasses.asdict(losses.summarise(domain, blocks, *compared))

        depends_on = _kl_facts(dense, pruned, blocks)
        found[domain] = store.value(f"kl-{domain}", compute, depends_on=depends_on)
        count.move(len(blocks))
    return found


def task_parts(
    store: Store,
    subject: Subject,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedTasks,
    options: TaskOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Return the tasks' results in the harness's shape, plus `sources` and `item_scores` by task.

    Ranks take whole tasks by turns, so each task is asked as by one process.
    """
    sizes = {name: num_questions(task, options) for name, task in loaded.tasks.items()}
    count = _Count(progress, f"{subject.which}: questions of tasks", sum(sizes.values()))
    count.move(0)

    def result_of(name: str) -> Part:
        before, task = count.done, loaded.tasks[name]

        def listen(done: int, total: int) -> None:
            count.move(before + sizes[name] * done // total - count.done)

        def compute() -> Part:
            return run_task(task, subject.model(), tokenizer, options, listen)

        depends_on = {**subject.facts, **dataclasses.asdict(options), **identity(task, loaded, tokenizer)}
        found = store.value(f"task-{name}", compute, depends_on=depends_on)
        count.move(before + sizes[name] - count.done)
        return found

    names = list(loaded.tasks)
    results = dict(zip(names, in_turns(result_of, names), strict=True))
    item_scores = {name: result["item_scores"] for name, result in results.items()}
    return {**merge(list(results.values()), loaded), "sources": loaded.sources, "item_scores": item_scores}


def _num_blocks(text: Mapping[str, Text]) -> int:
    return sum(len(blocks) for blocks in text.values())


def _facts(text: Text) -> Part:
    blocks = blocks_of(text)
    parts = [part.numpy().astype("<i8").tobytes() for block in blocks for part in block if part is not None]
    digest = hashlib.sha256(b"".join(parts)).hexdigest()
    lengths = [len(block.ids_T) for block in blocks]
    return {"blocks": lengths if len(set(lengths)) > 1 else [len(lengths), lengths[0]], "sha256": digest}


def _kl_facts(dense: Subject, pruned: Subject, text: Text) -> Part:
    return {"dense": dense.facts, "pruned": pruned.facts, **_facts(text)}
