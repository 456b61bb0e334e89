"""The journal of a run that writes OUT: a hidden directory beside it, from the first finished step until OUT is there.

In: OUT, all that the result depends on, whether to go on. Out: a `Journal`; for the same inputs one that knows what an
earlier run had finished. Only one process at a time has it, which the system sees to, however that process ends.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from secateur.checkpoint import Checkpoint
from secateur.errors import CheckpointError, NumericsError, RecipeError
from secateur.fingerprint import weight_digests
from secateur.journal import Journal
from secateur.output import disk_errors
from secateur.ranks import is_first
from secateur.recipe import Recipe
from secateur.runlog import RunLog
from secateur.staged_directory import check_replaceable, make_hidden, missing_parents, remove_empty
from secateur.summary import versions
from secateur.whole_file import load_json, save_json

INPUTS_FILE, CALIBRATION = "inputs.json", "calibration"
HOW = "the same command with --resume (in Python: resume=True) goes on from what is finished"
# Whatever of these a run has: the bytes of its result are the same.
_WITHOUT_EFFECT = {"memory_budget", "device_budget"}
# A file system that knows no locks, as some of clusters: two runs for one OUT are then the user's to avoid.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


def journal_for(
    out: Path | None,
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    computes: dict[str, Any],
    log: RunLog,
    *,
    resume: bool,
    overwrite: bool,
    tell: Callable[[str], None],
) -> AbstractContextManager[Journal]:
    """Return the journal of a run that can be resumed, see `journal_beside`; of any other one that keeps nothing.

    `checkpoint`: None for a model in memory, which a run cuts in place, so that it is not what it was.
    `computes`: where and in what, as far as the recipe leaves that to the machine.
    Raises CheckpointError if such a run is to `resume`.
    """
    if out is None or checkpoint is None:
        if resume:
            raise CheckpointError(
                "resume: only a run that writes to out and reads its model from files can go on; give both as paths, "
                "or leave resume out."
            )
        return nullcontext(Journal(log))
    if not is_first():
        return nullcontext(Journal(log))
    options = {"resume": resume, "overwrite": overwrite, "protected": checkpoint.directory, "tell": tell}
    return journal_beside(out, inputs_of(recipe, checkpoint) | {"computes": computes}, log, **options)


def inputs_of(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return all that the result depends on and that is known before a weight is read, for `journal_beside`.

    Calibration text is not: see `check_calibration`.
    """
    return {
        "recipe": recipe.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
        "model config": json.loads(checkpoint.config.to_json_string(use_diff=False)),
        "model file": weight_digests(checkpoint),
        "version of": versions(),
    }


@contextmanager
def journal_beside(
    out: Path,
    inputs: dict[str, Any],
    log: RunLog,
    *,
    resume: bool,
    overwrite: bool,
    protected: Path,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Journal]:
    """Yield the journal of the run that writes `out`.

    It is removed when the block ends well, when no step was finished, and after an error that the same inputs would
    meet again. In every other case it stays, and the exception gets a note that says how to go on. `tell` hears in a
    line what becomes of an earlier run's journal.

    Raises CheckpointError as `check_replaceable`, if another process has the journal, or if with `resume` the inputs
    have changed.
    """
    directory, made = journal_place(out), missing_parents(out)
    if not overwrite and _is_outlived(directory, out):
        _remove(directory, [])
    check_replaceable(out, overwrite=overwrite, protected=protected)
    if not directory.is_dir():
        make_hidden(directory, out)
    lock, journal, ours = _lock(directory, out), Journal(log, directory), False
    try:
        with disk_errors(out):
            _open(directory, inputs, out, resume=resume, tell=tell)
        ours = True
        yield journal
        _remove(directory, [])
    except BaseException as error:
        again = isinstance(error, RecipeError | NumericsError) and journal.num_kept
        if again or not _finished(directory):
            _remove(directory, made)
        elif ours:
            error.add_note(HOW)
        raise
    finally:
        os.close(lock)


def journal_place(out: Path) -> Path:
    """Return where the journal of a run that writes `out` is."""
    return out.with_name(f".{out.name}.resume")


def check_calibration(journal: Journal, content_hash: str, out: Path | None) -> None:
    """Raise CheckpointError if the journal is of a run on other calibration text."""
    if journal.value(CALIBRATION, lambda: content_hash) != content_hash:
        raise CheckpointError(
            f"OUT {out}: cannot be resumed, since the calibration text has changed; give the text that it was begun "
            f"with, or leave resume out to begin anew."
        )


def note_resumed(journal: Journal) -> None:
    """Say in the run log that an earlier run did part of the work."""
    if journal.num_found > 1:  # one is the calibration's hash
        text = f"resumed: {journal.num_found - 1} finished steps are of an earlier run, and seconds leave them out."
        journal.log.write({"event": "note", "text": text})


def _open(directory: Path, inputs: dict[str, Any], out: Path, *, resume: bool, tell: Callable[[str], None]) -> None:
    """Leave the directory with these inputs, and what an earlier run of them had finished if `resume`."""
    path = directory / INPUTS_FILE
    finished = _finished(directory) if path.is_file() else []
    if finished and resume:
        changed = _changes(load_json(path), inputs)
        if changed:
            raise CheckpointError(
                f"OUT {out}: cannot be resumed, since {', '.join(changed[:3])}; give what it was begun with, or leave "
                f"resume out to begin anew."
            )
        for file in directory.glob(".*"):
            file.unlink()  # half-written by a killed process
        tell(f"{out}: goes on from the {len(finished)} steps that an earlier run has finished.")
        return
    if finished:
        tell(f"{out}: begins anew; what an interrupted run had finished is removed (resume would go on from it).")
    elif resume:
        tell(f"{out}: nothing of an earlier run is there to go on from, so it begins anew.")
    path.unlink(missing_ok=True)  # first of all, since without it nothing there counts
    for file in directory.iterdir():
        file.unlink()
    save_json(path, inputs)


def _changes(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """Return what differs, as "recipe remove was 0.2 and is 0.3"."""
    changed: list[str] = []
    for key in sorted({*before, *now}, key=str):
        old, new, name = before.get(key), now.get(key), f"{where} {key}".strip()
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _changes(old, new, name)
        elif old != new:
            is_digest = where == "model file"
            changed.append(f"{name} has changed" if is_digest else f"{name} was {old} and is {new}")
    return changed


def _finished(directory: Path) -> list[str]:
    """Return the names of finished steps' files."""
    own = {INPUTS_FILE, f"{CALIBRATION}.json"}
    return [file.name for file in directory.iterdir() if file.name not in own and not file.name.startswith(".")]


def _is_outlived(directory: Path, out: Path) -> bool:
    """Whether `out` was finished after the journal's last step, so that its run was only killed before removing it."""
    if not (directory.is_dir() and out.is_dir()):
        return False
    return out.stat().st_mtime >= max((file.stat().st_mtime for file in directory.iterdir()), default=0.0)


def _remove(directory: Path, made: list[Path]) -> None:
    (directory / INPUTS_FILE).unlink(missing_ok=True)  # so that a half-removed journal counts for nothing
    shutil.rmtree(directory, ignore_errors=True)
    remove_empty(made)


def _lock(directory: Path, out: Path) -> int:
    """Return a descriptor of the directory that no other process has, until it is closed."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not directory.is_dir() or not os.path.samestat(os.fstat(descriptor), directory.stat()):
            raise BlockingIOError  # its owner has finished and removed it meanwhile
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"OUT {out}: another process is writing it; wait for its end, or choose another directory."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return descriptor
