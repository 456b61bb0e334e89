"""`secateur evaluate`: what a model can do, and, against its dense original, what pruning cost.

In: a model directory, perhaps the dense model, and what to measure. Out: one mapping of plain numbers, written to
`evaluation.json`. Everything that can be wrong without weights is checked before a weight is read. Every part is kept
in `evaluation/` as soon as it is done, so that an interrupted evaluation goes on where it stopped.

The dense model is measured first and leaves memory before the pruned one is loaded; for KL only its last hidden states
on the domains' blocks and its head stay.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.checkpoint_tokenizer import check_same_tokens, load_tokenizer
from secateur.errors import RecipeError
from secateur.evaluate_differences import differences
from secateur.evaluate_domains import RECIPE, Blocks, named_blocks, recipe_blocks
from secateur.evaluate_parts import Subject, dense_states, kl_parts, open_subject, quality_parts, task_parts
from secateur.evaluate_tasks import LoadedTasks, TaskOptions, load_tasks
from secateur.evaluate_wikitext import wikitext_blocks
from secateur.output import disk_errors
from secateur.progress import Progress, silent
from secateur.ranks import check_same, is_first
from secateur.ranks_group import joined
from secateur.recipe import Domain
from secateur.staged_file import staged_file
from secateur.store import Store
from secateur.summary import versions

FILE_NAME, PARTS_FOLDER = "evaluation.json", "evaluation"


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure. `domains` None: the held-out text of the model's own recipe.yaml, if it has one.

    `num_blocks` and `sequence_length` hold for `domains` only; `wikitext2`: a file of rows or `hub`; `tasks`: names of
    lm-evaluation-harness; `tasks_data`: a directory that their rows are looked for in first. `device`: as in a recipe.
    """

    domains: dict[str, Domain] | None = None
    num_blocks: int = 16
    sequence_length: int = 512
    wikitext2: str | None = None
    wikitext2_length: int | None = None
    tasks: tuple[str, ...] = ()
    task_options: TaskOptions = field(default_factory=TaskOptions)
    tasks_data: Path | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class _Text:
    """Everything that is asked of both models."""

    tokenizer: PreTrainedTokenizerBase
    blocks_NT: Blocks
    wikitext_NL: Tensor | None
    tasks: LoadedTasks | None
    notes: tuple[str, ...]


@joined()
def evaluate(
    model: str | Path,
    settings: Settings | None = None,
    *,
    against: str | Path | None = None,
    out: Path | None = None,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure `model` and, if given, the dense model `against`, and write `out`/evaluation.json (default: `model`).

    The result maps `pruned` (the model) and `dense` (the one against which, if any) to their `domains`, `wikitext2`
    and `tasks` (in lm-eval's own shape), `kl` to the divergence by domain, and `differences` to pruned minus dense
    with the standard error over the same blocks or questions. Under torchrun or `accelerate launch` every process calls
    this and gets the result; the ranks share blocks and tasks, and the first one writes. `tell` gets a line of
    text about every finished part that is damaged on disk, which is measured again.

    Raises a SecateurError, one sentence, for everything that a user can correct.
    """
    settings, progress = settings or Settings(), progress if is_first() else silent
    pruned = open_subject("pruned", model, settings.device)
    directory = _output_directory(out, pruned)
    dense = None if against is None else open_subject("dense", against, settings.device)
    tokenizer = load_tokenizer(pruned.checkpoint)
    if dense is not None:
        alone = "evaluate each alone and compare bits per byte"
        check_same_tokens(pruned.checkpoint, dense.checkpoint, tokenizer, "--against", alone)
    text = _prepare(settings, pruned, tokenizer, progress)
    models = (each.fingerprint for each in (pruned, dense) if each is not None)
    check_same({"model": " ".join(models), "text": str([int(ids_NT.sum()) for ids_NT in text.blocks_NT.values()])})
    with disk_errors(directory):
        (directory / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    store = Store(directory / PARTS_FOLDER, tell=tell)
    measured: dict[str, Any] = {}
    states = None
    if dense is not None:
        measured["dense"] = _measure(store, dense, text, settings.task_options, progress)
        states = dense_states(store, dense, pruned, text.blocks_NT, progress)
        dense.forget()
    measured["pruned"] = _measure(store, pruned, text, settings.task_options, progress)
    if dense is not None:
        measured["kl"] = kl_parts(store, dense, pruned, states, text.blocks_NT, progress)
        measured["differences"] = differences(measured["dense"], measured["pruned"])
    for which in ("dense", "pruned"):  # thousands of numbers, which the parts keep
        measured.get(which, {}).get("tasks", {}).pop("item_scores", None)
    result = {
        "model": pruned.checkpoint.reference,
        "against": None if dense is None else dense.checkpoint.reference,
        "settings": _plain(settings, text),
        "notes": list(text.notes),
        **measured,
        "versions": versions(),
    }
    if is_first():
        with staged_file(directory / FILE_NAME, overwrite=True) as staged:
            staged.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _output_directory(out: Path | None, subject: Subject) -> Path:
    checkpoint = subject.checkpoint
    if out is not None and out.exists() and not out.is_dir():
        raise RecipeError(f"--out {out}: is not a directory; choose another place.")
    if out is None and Path(checkpoint.reference) != checkpoint.directory:
        raise RecipeError(
            f"model {checkpoint.reference}: is no directory that an evaluation could be written into; "
            "say where with --out DIRECTORY."
        )
    return out or checkpoint.directory


def _prepare(settings: Settings, pruned: Subject, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> _Text:
    directory, notes = pruned.checkpoint.directory, ()
    wikitext_NL = None
    if settings.wikitext2 is not None:
        config = pruned.checkpoint.config
        wikitext_NL = wikitext_blocks(settings.wikitext2, settings.wikitext2_length, tokenizer, config)
    blocks_NT: Blocks = {}
    if settings.domains is not None:
        num_blocks, length = settings.num_blocks, settings.sequence_length
        blocks_NT = named_blocks(settings.domains, num_blocks, length, tokenizer, progress)
    elif (directory / RECIPE).is_file() or not (settings.tasks or settings.wikitext2):
        blocks_NT, notes = recipe_blocks(directory, tokenizer, progress)
    tasks = None
    if settings.tasks:
        tasks = load_tasks(settings.tasks, settings.task_options, settings.tasks_data)
        notes += tasks.notes
    return _Text(tokenizer, blocks_NT, wikitext_NL, tasks, notes)


def _measure(store: Store, subject: Subject, text: _Text, options: TaskOptions, progress: Progress) -> dict[str, Any]:
    tokenizer = text.tokenizer
    measured: dict[str, Any] = {
        "domains": quality_parts(store, subject, tokenizer, "domains", text.blocks_NT, progress)
    }
    if text.wikitext_NL is not None:
        blocks = {"test": text.wikitext_NL}
        measured["wikitext2"] = quality_parts(store, subject, tokenizer, "wikitext2", blocks, progress)["test"]
    if text.tasks is not None:
        measured["tasks"] = task_parts(store, subject, tokenizer, text.tasks, options, progress)
    return measured


def _plain(settings: Settings, text: _Text) -> dict[str, Any]:
    """Return the settings for the file; only names of files, since directories are this machine's."""
    data = dataclasses.asdict(settings)
    data |= {"domains": list(text.blocks_NT), "tasks": list(settings.tasks)}
    data["wikitext2"] = None if settings.wikitext2 is None else Path(settings.wikitext2).name
    data["wikitext2_length"] = None if text.wikitext_NL is None else text.wikitext_NL.shape[1]
    data["tasks_data"] = None if settings.tasks_data is None else settings.tasks_data.name
    return data
