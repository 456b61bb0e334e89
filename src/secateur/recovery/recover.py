"""A recovery: a pruned checkpoint and its dense model in, a better checkpoint out."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.log import Progress, silent
from secateur.ranks import alone, is_first, meet, staging_if_any
from secateur.recovery.open import changes_of, open_job, prepare, to_judge
from secateur.recovery.result import Finish, write_result
from secateur.recovery.train import Work, train_guarded
from secateur.report.measured import RecoveryRecord
from secateur.result_directory import check_replaceable, restore
from secateur.stream.device import keeping_freed


@keeping_freed()
def recover(
    pruned: str | Path,
    teacher: str | Path,
    recipe: dict[str, Any] | Path | str | None = None,
    *,
    out: str | Path,
    finish: Finish,
    tokens: int | None = None,
    overwrite: bool = False,
    other_dense: bool = False,
    command: str = "",
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> RecoveryRecord | None:
    """Recover. `finish`: writes what people read. The rest: see `api.recover`."""
    job = open_job(pruned, teacher, changes_of(recipe, tokens), other_dense=other_dense)
    candidates, path = job.candidates, Path(out)
    if is_first():
        restore(path, tell)
    else:
        progress, tell = silent, lambda text: None
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
