"""A recovery: a pruned checkpoint and its dense model in, a better checkpoint out."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from secateur.log import Progress, silent
from secateur.ranks import alone
from secateur.recovery.open import changes_of, open_job, prepare, to_judge
from secateur.recovery.result import Finish, write_result
from secateur.recovery.train import Work, train_guarded
from secateur.recovery.weights import wants_shards
from secateur.report.measured import RecoveryRecord
from secateur.result_directory import check_replaceable, restore, staging
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
    wants_shards()  # checks the launcher before anything is read
    job = open_job(pruned, teacher, changes_of(recipe, tokens), other_dense=other_dense)
    candidates = job.candidates
    path, is_main = Path(out), int(os.environ.get("RANK", "0")) == 0
    had_processes = _has_processes()
    if not is_main:
        progress, tell = silent, lambda text: None
    record = None
    if is_main:
        restore(path, tell)
    check_replaceable(path, overwrite=overwrite, protected=candidates.teacher.directory)
    target = staging(path, overwrite=overwrite, protected=candidates.pruned.directory) if is_main else nullcontext()
    with target as directory:
        work = prepare(job, path, progress, tell)
        with _told_if_interrupted(work):
            with work.log.time("recover"):
                before, training = train_guarded(work)
            _let_others_go(had_processes)
            if directory is not None:
                with alone():  # the others ask nothing
                    _judge_last(work, held=training.held)
                    record = write_result(work, job, before, training, directory, command, finish)
    if is_main:
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


def _let_others_go(had_processes: bool) -> None:
    """Wait until every process has trained; the first one does the rest alone."""
    if _has_processes():
        torch.distributed.barrier()  # nobody reads what is removed in the end
        if not had_processes:  # the Trainer made the group for this run
            torch.distributed.destroy_process_group()


def _has_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
