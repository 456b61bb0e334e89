"""A recovery: a pruned checkpoint and its dense model in, a better checkpoint out."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from secateur.facts import Judgement, TrainingRecord, Verdicts
from secateur.files import without_places
from secateur.formats.save import has_own, prove_reload, save_checkpoint
from secateur.log import LOG_FILE, Progress, Tell, versions
from secateur.model.checkpoint import TOKENS_FILE
from secateur.model.identity import name_of
from secateur.ranks import alone, meet
from secateur.recipe import RECIPE_FILE, Recipe, as_recipe, dump_recipe
from secateur.recovery.open import Job, inputs_of, open_job, prepare
from secateur.recovery.train import Work, train_guarded, training_folder
from secateur.report.records import RECOVERY_FILE, RecoveryRecord
from secateur.result_directory import BENCH_FILE, RESULT_FILE, check_replaceable
from secateur.store import begun
from secateur.stream.device import keeping_freed, peak_bytes
from secateur.stream.judge import Judge, ToJudge

# Files that stay true of the model: which units and tokens it has, how it was pruned, how fast it
# is.
CARRIED = ("keep.json", TOKENS_FILE, RESULT_FILE, BENCH_FILE, "README.md")


# Adds the record to the card in the directory, and writes digests and page.
Finish = Callable[[Path, RecoveryRecord], None]


@keeping_freed()
def recover(
    pruned: str | Path,
    teacher: str | Path,
    changes: Recipe,
    *,
    out: str | Path,
    finish: Finish,
    overwrite: bool,
    other_dense: bool,
    command: str,
    progress: Progress,
    tell: Tell,
) -> RecoveryRecord | None:
    """Recover. `finish`: writes what people read. The rest: see `api.recover`."""
    job, record = open_job(pruned, teacher, changes, other_dense=other_dense), None
    check_replaceable(Path(out), overwrite=overwrite, protected=job.teacher.directory)
    inputs, source = partial(inputs_of, job), job.pruned.directory
    with begun(
        out, inputs, overwrite=overwrite, protected=source, progress=progress, tell=tell
    ) as services:
        with training_folder(services, job.settings, "recover") as folder:
            work = prepare(job, folder, services)
            judge, judged = judged_first(job, work)
            # Or a store of a training alone would count as empty.
            services.store.value("training begun", lambda: True)
            with services.log.time("recover"):
                before, training = train_guarded(work)
        meet("trained")  # nobody reads any more what is removed in the end
        if services.scratch is not None:
            with alone():  # the others ask nothing
                if judge is not None:
                    judged["recovered"] = judged["pruned"]
                    if training.held:
                        written = ToJudge.of(work.pruned, "recovered", work.text.sequence_length)
                        with services.log.time("judge"):
                            judged["recovered"] = judge.pruned(written)
                record = write_result(
                    work, job, before, training, judged, services.scratch, command, finish
                )
    return record


def judged_first(job: Job, work: Work) -> tuple[Judge | None, dict[str, Judgement]]:
    """Judge the dense and the pruned model by the text that judged the pruning; return what judges,
    None if nothing.
    """
    teacher, length = work.teacher, work.text.sequence_length
    if not job.recipe.output.evaluate or teacher is None:
        return None, {}
    services = work.services
    judge = Judge(
        work.text.judged,
        job.tokenizer,
        work.pruned.config,
        services.store,
        services.progress,
        trim=job.trim,
    )
    dense = teacher if job.trim is None else job.load_teacher(whole=True)
    with services.log.time("judge"):
        first = ToJudge.of(dense, "dense", length)
        judged = {"dense": judge.dense(first, asks=first.load()[1].caches)}
        judged["pruned"] = judge.pruned(ToJudge.of(work.pruned, "pruned", length))
    return judge, judged


def write_result(
    work: Work,
    job: Job,
    before: Verdicts,
    training: TrainingRecord,
    judged: dict[str, Judgement],
    directory: Path,
    command: str,
    finish: Finish,
) -> RecoveryRecord:
    """Write everything that belongs to the result into `directory` and return its record.

    `before`: the verdicts before the training. `judged`: models, by their names. `finish`: writes
    what people read.
    """
    log, text = work.services.log, work.text
    with log.time("save"):
        _save(work, job, directory)
    with log.time("verify"):
        ids_NT = next(iter(text.held_out.values())).ids_NT
        proof = prove_reload(work.pruned, directory, ids_NT, work.services.progress)
    record = RecoveryRecord(
        pruned=name_of(job.pruned),
        teacher=name_of(job.teacher),
        command=command,
        calibration=without_places(
            job.recipe.calibration.model_dump(mode="json", exclude_none=True)
        ),
        settings=work.settings.model_dump(mode="json"),
        seed=work.seed,
        content_hash=text.content_hash,
        sequence_length=text.sequence_length,
        num_held_out_tokens=text.num_held_out_tokens,
        dense=work.judge.dense(),
        before=before,
        training=training,
        seconds={stage: round(seconds, 2) for stage, seconds in log.seconds.items()},
        peak_bytes=peak_bytes(),
        reload_max_abs_difference=proof.max_abs_difference,
        notes=log.notes,
        versions=versions(),
        judged=judged,
    )
    (directory / RECOVERY_FILE).write_text(record.to_json(), encoding="utf-8")

    # The run log goes on where that of the pruning ends.
    source = job.pruned.directory / LOG_FILE
    earlier = source.read_text(encoding="utf-8") if has_own(job.pruned.directory, LOG_FILE) else ""
    added = "".join(json.dumps(line) + "\n" for line in log.lines)
    (directory / LOG_FILE).write_text(earlier + added, encoding="utf-8")
    finish(directory, record)
    return record


def _save(work: Work, job: Job, directory: Path) -> None:
    """Write weights, configs, tokenizer, recipe, and what is carried over from the pruned model.

    The recipe is the pruned model's own, which still describes it, with `recover` added. Where the
    recovery used other text, recovery.json says which.
    """
    source, recipe = job.pruned.directory, job.recipe
    if (path := source / RECIPE_FILE).is_file():
        recipe = as_recipe(path).model_copy(update={"recover": recipe.recover})
    for sentence in save_checkpoint(work.pruned, job.tokenizer, directory, carry_from=source):
        work.services.log.note(sentence)
    (directory / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
    for name in CARRIED:
        if has_own(source, name):
            shutil.copyfile(source / name, directory / name)
