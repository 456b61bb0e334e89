"""`secateur evaluate`: what a model can do, and what pruning cost compared with the dense one.

In: a model, text and tasks. Out: an `Evaluation`, and `evaluation.json` in a result directory.
"""

from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.evaluation import parts
from secateur.evaluation.tasks import TaskOptions, is_chat, load_tasks
from secateur.evaluation.text import prompts_to_judge, text_to_judge
from secateur.log import Progress, Tell, mute, silent, versions
from secateur.model.identity import check_dense, is_result, name_of
from secateur.ranks import check_same, is_first, joined
from secateur.recipe import Domain
from secateur.report.records import Evaluation
from secateur.report.report import add_figures
from secateur.result_directory import EVALUATION_FILE, PARTS_FOLDER
from secateur.store import Store
from secateur.stream.device import keeping_freed
from secateur.stream.judge import Judge
from secateur.vocabulary.kept import Trim, kept_tokens_of, trim_between


@joined()
@keeping_freed()
def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    *,
    domains: dict[str, Domain] | None = None,
    num_blocks: int = 16,
    sequence_length: int | None = None,
    prompts: Domain | None = None,
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
    KL by domain and its own answers; `other_dense`: it is meant to be another one than `model` was
    pruned from. `domains`: text by name; None: what judged the run, by the model's own recipe.yaml.
    `num_blocks`, `sequence_length`: of `domains`; None: 512 tokens, or the model's positions if
    fewer. `prompts`: of files, which the dense model answers in place of those that come with
    secateur; those that the run asked are left out. `tasks`: names of lm-evaluation-harness.
    `limit`: questions per task. `num_fewshot`: examples in each prompt. `batch_size`: questions at
    a time. `run_code`: tasks may run code that the models write, in a process without network.
    `tasks_data`: a directory searched first for rows. `device`: as in a recipe. `out`: a directory,
    by default `model` if that is a result. `progress`: called with (stage, done, total). `tell`:
    gets a line about every finished part that is damaged on disk and measured again.

    Returns the record. Under torchrun every process calls this and gets it; ranks share blocks and
    tasks, and the first one writes. After an interruption the same call continues.

    Raises a SecateurError for what a user can correct: RecipeError for options, text and tasks,
    CheckpointError for models, NumericsError for a loss that is not finite.
    """
    options = TaskOptions(
        limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, run_code=run_code
    )
    progress = progress if is_first() else silent

    # Check the models, without their weights.
    pruned = parts.open_subject("pruned", model, device)
    directory = _output_directory(None if out is None else Path(out), pruned)
    dense = None if against is None else parts.open_subject("dense", against, device)
    notes_on_dense, trim = (), None
    if dense is not None:
        notes_on_dense = check_dense(
            pruned.checkpoint, dense.checkpoint, "--against", other=other_dense
        )
        alone = "evaluate each alone and compare bits per byte"
        trim = trim_between(pruned.checkpoint, dense.checkpoint, "--against", alone)

    # Find the prompts of the user's own, for which a model has to answer.
    asked, notes_on_prompts = None, ()
    if prompts is not None:
        if dense is None or not dense.arch.caches or dense.tokenizer().chat_template is None:
            raise RecipeError(
                "--prompts: needs a dense model with a chat template that answers them; give it by "
                "--against, or leave them out."
            )
        asked, note = prompts_to_judge(prompts, pruned.checkpoint)
        notes_on_prompts = (note,)

    # Read what they are asked, in the pruned model's tokens; all ranks have the same.
    tokenizer = pruned.tokenizer()
    text, notes = text_to_judge(
        pruned.checkpoint,
        domains,
        num_blocks,
        sequence_length,
        tokenizer,
        progress,
        is_needed=not tasks,
    )
    notes += notes_on_prompts
    loaded = load_tasks(tasks, options, tasks_data)
    if names := [name for name, task in loaded.tasks.items() if is_chat(task, tokenizer)]:
        notes += (f"asked through the chat template: {', '.join(names)}.",)
    notes += _note_on_tokens(pruned, trim)
    fingerprints = (subject.fingerprint for subject in (pruned, dense) if subject is not None)
    check_same(
        {
            "model": " ".join(fingerprints),
            "text": str([int(blocks.ids_NT.sum()) for blocks in text.values()]),
        }
    )

    store = Store.lasting(directory / PARTS_FOLDER, tell)
    judge = Judge(text, tokenizer, pruned.checkpoint.config, store, progress, trim, prompts=asked)

    # Measure the dense model, and forget it before the pruned one is loaded.
    before = kl_of = kl = changes = None
    dense_tasks: dict[str, Any] = {}
    if dense is not None:
        dense_scores = judge.dense(dense.to_judge(), asks=dense.arch.caches)
        dense_tasks = parts.task_parts(store, dense, judge.dense_tokenizer, loaded, progress)
        before = parts.measured_by(
            dense_scores, judge.dense_text, judge.dense_tokenizer, dense_tasks
        )
        if trim is not None:
            dense.keep(trim.kept)
        kl_of = parts.judge_of_kl(store, dense, pruned, text, progress)
        dense.forget()

    # Measure the pruned one, and what lies between them.
    scores = judge.pruned(pruned.to_judge())
    pruned_tasks = parts.task_parts(store, pruned, tokenizer, loaded, progress)
    after = parts.measured_by(scores, judge.text, tokenizer, pruned_tasks)
    if before is not None and kl_of is not None:
        kl = kl_of()
        changes = parts.differences(
            before, after, parts.task_changes(dense_tasks, pruned_tasks) if tasks else None
        )

    evaluation = Evaluation(
        model=name_of(pruned.checkpoint),
        against=None if dense is None else name_of(dense.checkpoint),
        notes=(*notes_on_dense, *notes),
        dense=before,
        pruned=after,
        kl=kl,
        differences=changes,
        versions=versions(),
        own_answers=scores.answers,
    )
    if is_first():
        add_figures(directory, EVALUATION_FILE, evaluation.to_json())
    return evaluation


def _output_directory(out: Path | None, subject: parts.Subject) -> Path:
    checkpoint = subject.checkpoint
    if out is None:
        if checkpoint.gguf_file or not is_result(Path(checkpoint.reference)):
            raise RecipeError(
                f"model {checkpoint.reference}: is not a result of secateur, so the evaluation is "
                "not written into it; say where with --out DIRECTORY."
            )
        return checkpoint.directory
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {out}: is not a directory; choose another place.")
    if is_result(out):
        if out.resolve() != checkpoint.directory.resolve():
            raise RecipeError(
                f"--out {out}: is another result, whose page would show these figures; choose "
                "another place."
            )
    elif not (out / PARTS_FOLDER).is_dir() and (out / EVALUATION_FILE).exists():
        raise RecipeError(
            f"--out {out}: has an {EVALUATION_FILE} that evaluate did not write; choose another "
            "place."
        )
    return out


def _note_on_tokens(pruned: parts.Subject, trim: Trim | None) -> tuple[str, ...]:
    """Return in which tokens the nats are, where the vocabulary was trimmed."""
    if trim is not None:
        return (
            f"the tokenizers differ ({trim.kept.num_dense:,} and {trim.kept.num_kept:,} tokens): "
            "losses are nats per token of the dense tokenizer; KL is over the kept tokens on the "
            "trimmed text.",
        )
    if (kept := kept_tokens_of(pruned.checkpoint.directory)) is not None:
        sizes = f"{kept.num_dense:,} to {kept.num_kept:,} tokens"
        return (
            f"the vocabulary was trimmed ({sizes}): losses are nats per token of the model's own "
            "tokenizer.",
        )
    return ()
