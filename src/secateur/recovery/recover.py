"""A recovery: a pruned checkpoint and its dense model in, a better checkpoint out."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.facts import Verdicts
from secateur.log import Progress, silent
from secateur.ranks import alone, is_first, meet, staging_if_any
from secateur.recovery.cost import TRAIN_DENSE, without_teacher
from secateur.recovery.open import changes_of, open_job, prepare
from secateur.recovery.pair import Candidates
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
                trained_dense = _trained_dense(work, candidates)
            meet("trained")  # nobody reads any more what is removed in the end
            if directory is not None:
                with alone():  # the first rank does the rest
                    judged = before, training, trained_dense
                    record = write_result(work, job, judged, directory, command, finish)
    if is_first():
        shutil.rmtree(work.directory)
    return record


def _trained_dense(work: Work, candidates: Candidates) -> Verdicts | None:
    """Return the verdicts of the dense model after the same steps of cross-entropy; None if not asked for.

    Training on a domain's text also adapts the dense model to it: what a recovery wins beyond that is repair.
    """
    if not work.settings.train_dense:
        return None
    settings, place = without_teacher(work.settings), work.directory / TRAIN_DENSE
    parts = {"settings": settings, "directory": place, "name": TRAIN_DENSE}
    before, training = train_guarded(replace(work, pruned=candidates.load_teacher(), teacher=None, **parts))
    return training.after if training.held else before


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
