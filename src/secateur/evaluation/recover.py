"""`secateur.recover`: a pruned checkpoint and its dense model in, a better checkpoint out.

What is trained is `recovery`'s; here it is judged, written, and proved.
"""

import shutil
from functools import partial
from pathlib import Path

from secateur.files import without_places
from secateur.formats.save import Verification, has_own, prove_reload, save_checkpoint
from secateur.log import LOG_FILE, Progress, Tell, mute, silent, versions
from secateur.model.checkpoint import TOKENS_FILE
from secateur.model.identity import name_of
from secateur.ranks import alone, joined, meet
from secateur.recipe import AnyRecipe, RecoverySettings, as_recipe, recipe_in, write_recipe
from secateur.recovery.open import Job, inputs_of, open_job, prepare
from secateur.recovery.train import Work, train_guarded, training_folder
from secateur.report.records import RECOVERY_FILE, RecoveryRecord
from secateur.report.report import write_recovered_pages
from secateur.result_directory import BENCH_FILE, RESULT_FILE, check_replaceable
from secateur.store import begun
from secateur.stream.device import keeping_freed, peak_bytes
from secateur.stream.judge import Judge, Judgement, ToJudge

# Files that stay true of the model: which units and tokens it has, how it was pruned, how fast it
# is; and the run's log, which goes on.
CARRIED = ("keep.json", TOKENS_FILE, RESULT_FILE, BENCH_FILE, "README.md", LOG_FILE)


@joined()
@keeping_freed()
def recover(
    pruned: str | Path,
    teacher: str | Path,
    recipe: AnyRecipe = None,
    *,
    out: str | Path,
    tokens: int | None = None,
    overwrite: bool = False,
    other_dense: bool = False,
    command: str = "",
    progress: Progress = silent,
    tell: Tell = mute,
) -> RecoveryRecord | None:
    """Train `pruned` to win back what pruning took from the dense `teacher`; write it to `out`.

    `recipe`: the keys given here go over the recipe.yaml of `pruned`. Its key `recover` says how to
    train, and on how many tokens. `tokens`: to train on, all domains together. `overwrite`: replace
    `out` if it is a result. `other_dense`: the teacher is meant to be another model than `pruned`
    was pruned from. `command`: how to repeat the run, for the model card. `progress`: called with
    (stage, done, total). `tell`: gets lines of text, at every evaluation and of interrupted runs.

    Returns the `RecoveryRecord` that recovery.json holds. The result is never worse: if what
    the training minimises did not fall on held-out text, the old weights are written, and a note
    says so.
    Under torchrun or `accelerate launch` every process calls this; the first one writes, the others
    return None.

    Raises a SecateurError, one sentence, for everything that a user can correct: RecipeError for
    the recipe and for missing packages, CheckpointError for models that do not fit each other.
    """
    changes = as_recipe(recipe)
    if tokens is not None:
        settings = (changes.recover or RecoverySettings()).model_copy(update={"num_tokens": tokens})
        changes = changes.model_copy(update={"recover": settings})
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
        if (directory := services.scratch) is not None:
            with alone():  # the others ask nothing
                if judge is not None:
                    judged["recovered"] = judged["pruned"]
                    if training.held:
                        written = ToJudge.of(work.pruned, "recovered", work.text.sequence_length)
                        with services.log.time("judge"):
                            judged["recovered"] = judge.pruned(written)
                proof = _saved(work, job, directory)

                # What people read: its record, the run's log, card and page.
                log, text = services.log, work.text
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
                log.append_to(directory)  # behind the lines of the pruning
                write_recovered_pages(directory, record)
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


def _saved(work: Work, job: Job, directory: Path) -> Verification:
    """Write weights, configs, tokenizer, recipe, and what is carried over from the pruned model;
    have a fresh process compute the same logits.

    The recipe is the pruned model's own, which still describes it, with `recover` added. Where the
    recovery used other text, recovery.json says which.
    """
    source, recipe, log = job.pruned.directory, job.recipe, work.services.log
    with log.time("save"):
        if (own := recipe_in(source)) is not None:
            recipe = own.model_copy(update={"recover": recipe.recover})
        for sentence in save_checkpoint(work.pruned, job.tokenizer, directory, carry_from=source):
            log.note(sentence)
        write_recipe(directory, recipe)
        for name in CARRIED:
            if has_own(source, name):
                shutil.copyfile(source / name, directory / name)
    with log.time("verify"):
        ids_NT = next(iter(work.text.held_out.values())).ids_NT
        return prove_reload(work.pruned, directory, ids_NT, work.services.progress)
