"""A recovery: a pruned checkpoint and its dense model in, a better checkpoint out."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.facts import TrainingRecord, Verdicts
from secateur.files import without_places
from secateur.formats.save import has_own, prove_reload, save_checkpoint
from secateur.log import LOG_FILE, Progress, Tell, mute, silent, versions
from secateur.model.checkpoint import TOKENS_FILE
from secateur.model.identity import name_of
from secateur.ranks import alone, is_first, meet
from secateur.recipe import Keys, as_recipe, dump_recipe
from secateur.recovery.open import Job, changes_of, open_job, prepare, to_judge
from secateur.recovery.train import Work, train_guarded
from secateur.report.measured import RECOVERY_FILE, RecoveryRecord
from secateur.report.records import RECIPE_FILE
from secateur.result_directory import BENCH_FILE, RESULT_FILE, check_replaceable, restore, staging_if_any
from secateur.stream.device import keeping_freed, peak_bytes

# Files that stay true of the model: which units and tokens it has, how it was pruned, how fast it is.
CARRIED = ("keep.json", TOKENS_FILE, RESULT_FILE, BENCH_FILE, "README.md")


# Adds the record to the card in the directory, and writes digests and page.
Finish = Callable[[Path, RecoveryRecord], None]


@keeping_freed()
def recover(
    pruned: str | Path,
    teacher: str | Path,
    recipe: Keys | Path | str | None = None,
    *,
    out: str | Path,
    finish: Finish,
    tokens: int | None = None,
    overwrite: bool = False,
    other_dense: bool = False,
    command: str = "",
    progress: Progress = silent,
    tell: Tell = mute,
) -> RecoveryRecord | None:
    """Recover. `finish`: writes what people read. The rest: see `api.recover`."""
    job = open_job(pruned, teacher, changes_of(recipe, tokens), other_dense=other_dense)
    candidates, path = job.candidates, Path(out)
    if is_first():
        restore(path, tell)
    else:
        progress, tell = silent, mute
    check_replaceable(path, overwrite=overwrite, protected=candidates.teacher.directory)
    record = None
    with staging_if_any(path, overwrite=overwrite, protected=candidates.pruned.directory, tell=tell) as directory:
        work = prepare(job, path, progress, tell)
        with _told_if_interrupted(work):
            with work.log.time("recover"):
                before, training = train_guarded(work)
            meet("trained")  # nobody reads any more what is removed in the end
            if directory is not None:
                with alone():  # the others ask nothing
                    _judge_last(work, held=training.held)
                    record = write_result(work, job, before, training, directory, command, finish)
    if is_first():
        shutil.rmtree(work.directory)
    return record


def _judge_last(work: Work, *, held: bool) -> None:
    """Judge the model that is written. `held`: whether the training changed it."""
    if work.last_judge is None:
        return
    with work.log.time("judge"):
        after = work.last_judge.pruned(to_judge(work, "recovered", work.pruned)) if held else work.judgements["pruned"]
    work.judgements["recovered"] = after


@contextmanager
def _told_if_interrupted(work: Work) -> Iterator[None]:
    """Say where an interrupted run leaves what it had finished."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            place = work.directory
            work.tell(
                f"{place}: keeps what is finished; the same command goes on from there, or delete it to start anew."
            )


def write_result(
    work: Work,
    job: Job,
    before: Verdicts,
    training: TrainingRecord,
    directory: Path,
    command: str,
    finish: Finish,
) -> RecoveryRecord:
    """Write everything that belongs to the result into `directory` and return its record.

    `before`: the verdicts before the training. `finish`: writes what people read.
    """
    with work.log.time("save"):
        _save(work, job, directory)
    with work.log.time("verify"):
        ids_NT = next(iter(work.text.held_out.values())).ids_NT
        proof = prove_reload(work.pruned, directory, ids_NT, work.progress)
    pruned, teacher = job.candidates.pruned, job.candidates.teacher
    record = RecoveryRecord(
        name_of(pruned),
        name_of(teacher),
        command,
        calibration=without_places(job.recipe.calibration.model_dump(mode="json", exclude_none=True)),
        settings=work.settings.model_dump(mode="json"),
        seed=work.seed,
        content_hash=work.text.content_hash,
        sequence_length=work.text.sequence_length,
        num_held_out_tokens=work.text.num_held_out_tokens,
        dense=work.judge.dense(),
        before=before,
        training=training,
        seconds={stage: round(seconds, 2) for stage, seconds in work.log.seconds.items()},
        peak_bytes=peak_bytes(),
        reload_max_abs_difference=proof.max_abs_difference,
        notes=work.log.notes,
        versions=versions(),
        judged=work.judgements,
    )
    _write_record(record, work, job.candidates.pruned.directory, directory)
    finish(directory, record)
    return record


def _save(work: Work, job: Job, directory: Path) -> None:
    """Write weights, configs, tokenizer, recipe, and what is carried over from the pruned model.

    The recipe is the pruned model's own, which still describes it, with `recover` added. Where the
    recovery used other text, recovery.json says which.
    """
    source, recipe = job.candidates.pruned.directory, job.recipe
    if (path := source / RECIPE_FILE).is_file():
        recipe = as_recipe(path).model_copy(update={"recover": recipe.recover})
    options: dict[str, Any] = {"max_shard_size": recipe.output.max_shard_size, "carry_from": source}
    for sentence in save_checkpoint(work.pruned, job.candidates.tokenizer, directory, **options):
        work.log.note(sentence)
    (directory / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
    for name in CARRIED:
        if has_own(source, name):
            shutil.copyfile(source / name, directory / name)


def _write_record(record: RecoveryRecord, work: Work, source: Path, directory: Path) -> None:
    """Write recovery.json, and continue the run log."""
    (directory / RECOVERY_FILE).write_text(record.to_json(), encoding="utf-8")
    earlier = (source / LOG_FILE).read_text(encoding="utf-8") if has_own(source, LOG_FILE) else ""
    added = "".join(json.dumps(line) + "\n" for line in work.log.lines)
    (directory / LOG_FILE).write_text(earlier + added, encoding="utf-8")
