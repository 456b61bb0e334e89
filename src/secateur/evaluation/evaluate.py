"""`secateur evaluate`: what a model can do, and what pruning cost compared with the dense one.

In: a model, text and tasks. Out: an `Evaluation`, and `evaluation.json` in a result directory.
"""

import dataclasses
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.data.blocks import Blocks, Text
from secateur.errors import RecipeError
from secateur.evaluation import parts
from secateur.evaluation.tasks import LoadedTasks, TaskOptions, is_chat, load_tasks
from secateur.evaluation.text import check_length, has_recipe, named_blocks, recipe_blocks
from secateur.files import write_text
from secateur.log import Progress, Tell, mute, silent, versions
from secateur.model.checkpoint import load_tokenizer
from secateur.model.identity import check_dense, is_result, name_of
from secateur.model.kept_tokens import Trim, kept_tokens_of, trim_between
from secateur.ranks import check_same, is_first, joined
from secateur.recipe import Domain
from secateur.report.measured import Evaluation
from secateur.result_directory import EVALUATION_FILE, PARTS_FOLDER
from secateur.store import Store
from secateur.stream.device import keeping_freed
from secateur.stream.judge import Judge


@dataclass(frozen=True, slots=True)
class _Settings:
    """The options of `evaluate` on what to measure, in the order of the file."""

    domains: dict[str, Domain] | None
    num_blocks: int
    sequence_length: int
    tasks: tuple[str, ...]
    task_options: TaskOptions
    tasks_data: Path | None
    device: str | None


@dataclass(frozen=True, slots=True)
class _Text:
    """Everything that a model is asked, in its own tokens.

    `domains`: blocks by name.
    """

    tokenizer: PreTrainedTokenizerBase
    domains: dict[str, Blocks]
    tasks: LoadedTasks | None
    notes: tuple[str, ...]


@joined()
@keeping_freed()
def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    *,
    domains: dict[str, Domain] | None = None,
    num_blocks: int = 16,
    sequence_length: int = 512,
    tasks: tuple[str, ...] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    run_code: bool = False,
    tasks_data: Path | None = None,
    device: str | None = None,
    other_dense: bool = False,
    out: Path | str | None = None,
    progress: Progress = silent,
    tell: Tell = mute,
) -> Evaluation:
    """Measure a model, and the cost of pruning against a dense one; write evaluation.json.

    `model`: a result of `prune`, or any other model. `against`: the dense model, for differences,
    KL by domain and its own answers; `other_dense`: it is meant to be another one than `model` was pruned from.
    `domains`: text by name; None: what judged the run, by the model's own
    recipe.yaml. `num_blocks`, `sequence_length`: of `domains`. `tasks`: names of
    lm-evaluation-harness. `limit`: questions per task. `num_fewshot`: examples in each prompt.
    `batch_size`: questions at a time. `run_code`: tasks may run code that the models write, in a
    process without network. `tasks_data`: a directory searched first for rows. `device`: as in a recipe.
    `out`: a directory, by default `model` if that is a result. `progress`:
    called with (stage, done, total). `tell`: gets a line about every finished part that is damaged
    on disk and measured again.

    Returns the record. Under torchrun every process calls this and gets it; ranks share blocks and tasks, and
    the first one writes. After an interruption the same call continues.

    Raises a SecateurError for what a user can correct: RecipeError for options, text and tasks,
    CheckpointError for models, NumericsError for a loss that is not finite.
    """
    options = TaskOptions(limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, run_code=run_code)
    settings = _Settings(domains, num_blocks, sequence_length, tuple(tasks), options, tasks_data, device)
    progress = progress if is_first() else silent
    pruned = parts.open_subject("pruned", model, settings.device)
    directory = _output_directory(None if out is None else Path(out), pruned)
    dense = None if against is None else parts.open_subject("dense", against, settings.device)
    of_dense, alone = (), "evaluate each alone and compare bits per byte"
    if dense is not None:
        of_dense = check_dense(pruned.checkpoint, dense.checkpoint, "--against", other=other_dense)
    trim = None if dense is None else trim_between(pruned.checkpoint, dense.checkpoint, "--against", alone)
    text = _prepare(settings, pruned, progress)
    models = (each.fingerprint for each in (pruned, dense) if each is not None)
    check_same({"model": " ".join(models), "text": str([int(part.ids_NT.sum()) for part in text.domains.values()])})
    if (note := _note_on_tokens(pruned, trim)) is not None:
        text = replace(text, notes=(*text.notes, note))
    store = Store.lasting(directory / PARTS_FOLDER, tell)
    judge = Judge(dict[str, Text](text.domains), text.tokenizer, pruned.checkpoint.config, store, progress, trim)
    asks_tasks = partial(_tasks, store, text, settings.task_options, progress)
    before = kl_of = kl = changes = None
    harness: dict[str, Any] = {}
    if dense is not None:
        scores = judge.dense(dense.to_judge())
        harness = asks_tasks(dense, judge.dense_tokenizer)
        before = parts.measured_by(scores, judge.dense_text, judge.dense_tokenizer, harness)
        if trim is not None:
            dense.keep(trim.kept)
        kl_of = parts.judge_of_kl(store, dense, pruned, text.domains, progress)
        dense.forget()
    scores = judge.pruned(pruned.to_judge())
    own_harness = asks_tasks(pruned, text.tokenizer)
    after = parts.measured_by(scores, judge.text, text.tokenizer, own_harness)
    if before is not None and kl_of is not None:
        kl = kl_of()
        of_tasks = parts.task_changes(harness, own_harness) if text.tasks is not None else None
        changes = parts.differences(before, after, of_tasks)
    evaluation = Evaluation(
        model=name_of(pruned.checkpoint),
        against=None if dense is None else name_of(dense.checkpoint),
        settings=_plain(settings, text),
        notes=(*of_dense, *text.notes),
        dense=before,
        pruned=after,
        kl=kl,
        differences=changes,
        versions=versions(),
        own_answers=scores.answers,
    )
    if is_first():
        write_text(directory / EVALUATION_FILE, evaluation.to_json())
    return evaluation


def _output_directory(out: Path | None, subject: parts.Subject) -> Path:
    checkpoint = subject.checkpoint
    if out is not None and out.exists() and not out.is_dir():
        raise RecipeError(f"--out {out}: is not a directory; choose another place.")
    if (
        out is not None
        and not is_result(out)
        and not (out / PARTS_FOLDER).is_dir()
        and (out / EVALUATION_FILE).exists()
    ):
        raise RecipeError(f"--out {out}: has an {EVALUATION_FILE} that evaluate did not write; choose another place.")
    if out is None and (checkpoint.gguf_file or not is_result(Path(checkpoint.reference))):
        raise RecipeError(
            f"model {checkpoint.reference}: is not a result of secateur, so the evaluation is not written into it; "
            "say where with --out DIRECTORY."
        )
    return out or checkpoint.directory


def _prepare(settings: _Settings, pruned: parts.Subject, progress: Progress) -> _Text:
    """Return the text in the pruned model's tokens."""
    directory, notes, config = pruned.checkpoint.directory, (), pruned.checkpoint.config
    tokenizer, domains = load_tokenizer(pruned.checkpoint), dict[str, Blocks]()
    if settings.domains is not None:
        num_blocks, length = settings.num_blocks, settings.sequence_length
        domains, notes = named_blocks(settings.domains, num_blocks, length, tokenizer, progress, directory)
        check_length(length, config.get_text_config())
    elif has_recipe(directory) or not settings.tasks:
        domains, notes = recipe_blocks(directory, tokenizer, progress)
    tasks = None
    if settings.tasks:
        tasks = load_tasks(settings.tasks, settings.task_options, settings.tasks_data)
        written = [name for name, task in tasks.tasks.items() if is_chat(task, tokenizer)]
        chat = (f"asked through the chat template: {', '.join(written)}.",) if written else ()
        notes += chat
    return _Text(tokenizer, domains, tasks, notes)


def _note_on_tokens(pruned: parts.Subject, trim: Trim | None) -> str | None:
    """Return in which tokens the nats are, where the vocabulary was trimmed."""
    if trim is not None:
        return (
            f"the tokenizers differ ({trim.kept.num_dense:,} and {len(trim.kept.dense_ids):,} tokens): losses are nats "
            "per token of the dense tokenizer; KL is over the kept tokens on the trimmed text."
        )
    if (kept := kept_tokens_of(pruned.checkpoint.directory)) is not None:
        sizes = f"{kept.num_dense:,} to {len(kept.dense_ids):,} tokens"
        return f"the vocabulary was trimmed ({sizes}): losses are nats per token of the model's own tokenizer."
    return None


def _tasks(
    store: Store,
    text: _Text,
    options: TaskOptions,
    progress: Progress,
    subject: parts.Subject,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Return all that `task_parts` does of one model; empty without tasks."""
    if text.tasks is None:
        return {}
    return parts.task_parts(store, subject, tokenizer, text.tasks, options, progress)


def _plain(settings: _Settings, text: _Text) -> dict[str, Any]:
    """Return the settings for the file. Names of files only: directories are this machine's."""
    data = dataclasses.asdict(settings)
    data |= {"domains": list(text.domains), "tasks": list(settings.tasks)}
    data["tasks_data"] = None if settings.tasks_data is None else settings.tasks_data.name
    return data
