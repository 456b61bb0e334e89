"""The store: a job's finished steps in a directory, from which the same job can resume.

In: a step's name and its outcome, as JSON or tensors. Out: the same when the step comes again; None
if it is new. Step NAME has a record NAME.json and, for tensors, NAME.safetensors. The record is
written last, so a step is complete or absent. It begins with the sha256 of its own bytes and has
that of the tensors, or of files that another library wrote. Every read checks both: a damaged step
is reported, removed and done again.

`inputs.json` has the job's inputs, which `Store.open` checks. Inputs that become known later are in
input-NAME.json. If any of these is damaged, the whole store is void. With several ranks the first
one reads and writes and tells the others, who ask in the same order.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.errors import CheckpointError, NumericsError, RecipeError
from secateur.files import (
    check_free_space,
    disk_errors,
    files_in,
    json_of,
    make_directory,
    missing_parents,
    remove_empty,
    sha256_of,
    whole_file,
)
from secateur.log import Progress, RunLog, Tell, mute, silent
from secateur.ranks import from_first, is_first, size
from secateur.result_directory import check_replaceable, restore, staging

INPUTS, INPUT = "inputs", "input-"
HOW = "the same command goes on from what is finished"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SEAL = b'{"sha256": "%s",'
_SEAL_BYTES = len(_SEAL) - len(b"%s") + 64
# The file is missing, or the disk cannot read it.
_UNREADABLE = {errno.ENOENT, errno.EIO}
# File systems without locks, as on some clusters: users must avoid two runs for one OUT.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}

Record = dict[str, Any]


class Store:
    """Finished steps by name. `directory` None: nothing is saved. `open` adds inputs and a lock.

    `log`: a step's log lines are saved with its value and written again. `label`: the directory's
    name in sentences. `tell`: gets a line about every damaged step. `num_found`: steps found from
    an earlier run; `num_saved`: records written by this one. `before`: of another job, whose steps
    serve where they have the same name.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        log: RunLog | None = None,
        label: str = "",
        tell: Tell = mute,
    ) -> None:
        self.directory, self.tell = directory, tell
        self.before: Store | None = None
        self.log = RunLog() if log is None else log
        self.label = label or str(directory)
        self.num_found = self.num_saved = 0
        self._promised: set[str] = set()

    @classmethod
    def lasting(cls, directory: Path, tell: Tell, label: str = "") -> "Store":
        """Return a store that stays in its directory; steps say what they `depends_on`. The first
        rank alone tells.
        """
        make_directory(directory, directory.parent, exist_ok=True)
        return cls(directory, label=label, tell=tell if is_first() else mute)

    @classmethod
    @contextmanager
    def open(
        cls,
        out: Path,
        inputs: Mapping[str, Any],
        log: RunLog,
        *,
        overwrite: bool,
        protected: Path | None,
        tell: Tell = mute,
    ) -> Iterator["Store"]:
        """Yield the store of the job that writes `out`; only one process at a time has it.

        `inputs`: all that the result depends on and that is known by now, as plain JSON by name.
        The store is removed when the block succeeds, when no step was finished, and after an error
        that the same inputs would cause again. Otherwise it stays, and a note on the exception says
        how to resume. `tell`: gets a line on what happens to an earlier run's store.

        Raises CheckpointError like `check_replaceable`, if another process has the store, or if it
        is of other inputs.
        """
        directory, made = place_beside(out), missing_parents(out)
        if not overwrite and _is_outlived(directory, out):
            _remove(directory, [])
        restore(out, tell)
        check_replaceable(out, overwrite=overwrite, protected=protected)
        if not os.path.isdir(directory):  # where Path raises if a name is too long
            make_directory(directory, out)
        lock = _lock(directory, out)
        store = cls(directory, log=log, label=str(out), tell=tell)
        ours = False
        try:
            with disk_errors(out):
                store._begin(directory, json.loads(json.dumps(inputs)))
            ours = True
            yield store
            _remove(directory, [])
        except BaseException as error:
            again = isinstance(error, RecipeError | NumericsError) and store.num_saved
            if again or not _finished(directory):
                _remove(directory, made)
            elif ours:
                error.add_note(HOW)
            raise
        finally:
            os.close(lock)

    def value(
        self,
        name: str,
        compute: Callable[[], Any],
        *,
        kind: Any = Any,
        depends_on: Mapping[str, Any] | None = None,
        is_input: bool = False,
    ) -> Any:
        """Return what `compute` gives, of this `kind`, as read back from JSON; writes its log lines
        either way.

        `depends_on`: what the value depends on, if the store has no inputs; other values are
        ignored. `is_input`: later steps rest on the value, and computing it again would give
        another one.
        """
        step = _Name(name, depends_on, is_input)
        finished = from_first(
            lambda: self._record(step.stem) or (self.before and self.before._record(step.stem))
        )
        if finished is not None:
            for line in finished["lines"]:
                self.log.write(line)
            self.num_found += not is_input
            value = finished["value"]
        else:
            first = len(self.log.lines)
            value = json.loads(
                json.dumps(compute(), default=_plain)
            )  # a first run gets the same types
            self._write(
                step.stem, step._asdict() | {"value": value, "lines": self.log.lines[first:]}
            )
        return TypeAdapter(kind).validate_python(value)

    def check_input(self, name: str, text: str) -> None:
        """Add an input that becomes known only now. Raises CheckpointError if it has changed."""
        if self.value(name, lambda: text, is_input=True) != text:
            raise self._is_of_others(f"the {name} has changed")

    def has(self, name: str, depends_on: Mapping[str, Any] | None = None) -> bool:
        """Whether the step is finished; the caller may then rely on finding it."""
        stem = _Name(name, depends_on).stem

        def promised() -> bool:
            if stem not in self._promised and self._record(stem) is not None:
                self._promised.add(stem)
            return stem in self._promised

        return from_first(promised)

    def find(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the line of a saved step; None if it is not finished."""

        def found() -> tuple[dict[str, Tensor], dict[str, Any]] | None:
            for store in filter(None, (self, self.before)):
                if store.directory is not None and (record := store._record(name)):
                    # Mapped from the file: a tensor fills memory only once it is used.
                    tensors = load_file(store.directory / f"{name}.safetensors")
                    return tensors, record["line"]
            return None

        outcome = from_first(found)
        self.num_found += outcome is not None
        return outcome

    def save(self, name: str, tensors: Mapping[str, Tensor], line: dict[str, Any]) -> None:
        """Save a finished step: its tensors and a line, which the caller logs."""
        self._write(name, _Name(name)._asdict() | {"line": line}, tensors)

    def save_files(self, directory: Path) -> None:
        """Save the finished step of the directory's name: its outcome is the files that another
        library wrote there.
        """
        outcome = {"value": _digests(directory), "lines": []}
        self._write(directory.name, _Name(directory.name)._asdict() | outcome)

    def has_files(self, directory: Path) -> bool:
        """Whether the step is finished and its files are as they were saved; no byte may differ."""
        record = self._record(directory.name)
        if record is None or record["value"] == _digests(directory):
            return record is not None
        self._remove_damaged(directory.name)
        return False

    def hand_on(self, directory: Path) -> None:
        """Move the finished steps there, for another job, and folders of parts; inputs stay."""
        for path in (self.directory or directory).glob("[!.]*"):
            if not path.name.startswith(INPUT[:-1]):
                shutil.move(path, directory / path.name)

    def note_found(self) -> None:
        """Log that an earlier run did part of the work."""
        if self.num_found:
            self.log.note(
                f"{self.num_found} finished steps are of an earlier run, and seconds leave them "
                "out."
            )

    def _begin(self, directory: Path, inputs: dict[str, Any]) -> None:
        """Prepare the directory for these inputs, with an earlier run's steps of the same ones."""
        path = directory / f"{INPUTS}.json"
        finished = _finished(directory) if path.is_file() else []
        if finished:
            damaged = self._check_inputs(directory, inputs)
            if not damaged:
                for file in directory.glob(".*"):
                    file.unlink()  # half-written by a killed process
                intact = [stem for stem in finished if self._record(stem) is not None]
                if intact:
                    self.tell(
                        f"{self.label}: goes on from the {len(intact)} steps that an earlier run "
                        "has finished."
                    )
                return
            self.tell(
                f"{self.label}: begins anew; {damaged} of an interrupted run is damaged on disk."
            )
        path.unlink(missing_ok=True)  # first: without it nothing counts
        for path in directory.iterdir():
            shutil.rmtree(
                path
            ) if path.is_dir() and not path.is_symlink() else path.unlink()  # a polish has a folder
        self._write(INPUTS, {"inputs": inputs})
        self.num_saved = 0

    def _check_inputs(self, directory: Path, inputs: dict[str, Any]) -> str:
        """Return the first damaged input file. Raises CheckpointError for changed inputs."""
        record = _intact(directory / f"{INPUTS}.json")
        if record is None:
            return f"{INPUTS}.json"
        if changed := changes_of(record["inputs"], inputs):
            raise self._is_of_others(", ".join(changed[:3]))
        known = sorted(directory.glob(f"{INPUT}*.json"))
        return next((file.name for file in known if _intact(file) is None), "")

    def _is_of_others(self, changes: str) -> CheckpointError:
        """Return the error for what an interrupted run of other inputs has left."""
        return CheckpointError(
            f"OUT {self.label}: an interrupted run had other inputs: {changes}; give those to go "
            f"on with it, or delete {place_beside(Path(self.label))} to begin anew."
        )

    def _record(self, stem: str) -> Record | None:
        """Return the step's record if it and its tensors are present and undamaged."""
        path = self._path(stem)
        if path is None or (not path.is_file() and stem not in self._promised):
            return None
        if (record := _intact(path)) is not None:
            return record
        if stem in self._promised or stem.startswith(INPUT):
            raise CheckpointError(
                f"{self.label}: {stem}, a step that this run goes on from, was damaged on disk "
                "meanwhile; start the same command again, which does it anew."
            )
        self._remove_damaged(stem)
        return None

    def _remove_damaged(self, stem: str) -> None:
        """Tell of a step that counts as never done from now on."""
        self.tell(
            f"{self.label}: {stem}, finished by an earlier run, is damaged on disk, so it is done "
            "again."
        )
        if (path := self._path(stem)) is not None:
            path.unlink(missing_ok=True)
            path.with_suffix(".safetensors").unlink(missing_ok=True)

    def _write(
        self, stem: str, record: Record, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        path = self._path(stem)
        if path is None or not is_first():
            return
        with disk_errors(path):
            if tensors is not None:
                held = {
                    name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
                }
                with whole_file(path.with_suffix(".safetensors")) as staged:
                    save_file(held, staged)
                    record = record | {"tensors": sha256_of(staged)}
            with whole_file(path) as staged:
                staged.write_bytes(_sealed(record))
        self.num_saved += 1

    def _path(self, stem: str) -> Path | None:
        return None if self.directory is None else self.directory / f"{stem}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What a long job reports to and resumes from. The defaults report and save nothing.

    `tell`: gets sentences for people. `scratch`: a directory for this run's files; None: the
    system's temporary directory.
    """

    progress: Progress = silent
    log: RunLog = field(default_factory=RunLog)
    store: Store = field(default_factory=Store)
    scratch: Path | None = None
    tell: Tell = mute

    def check_space(self, num_bytes: int) -> None:
        """Raise CheckpointError if the disk of `scratch` has less free."""
        if self.scratch is not None:
            check_free_space(self.scratch, num_bytes)

    def part(self, name: str) -> "Services":
        """Return those of a part of the job: a log of its own, and folders of its name."""
        self.store.value(
            f"part {name}", lambda: True
        )  # or a store of parts alone would count as empty
        log = self.log.part()
        folders = [folder and folder / name for folder in (self.store.directory, self.scratch)]
        for folder in filter(None, folders):
            folder.mkdir(exist_ok=True)
        if folders[1] is not None:
            log.append_to(folders[1])
        store = Store(folders[0], log=log, label=self.store.label, tell=self.store.tell)
        return replace(self, log=log, store=store, scratch=folders[1])


@contextmanager
def begun(
    out: Path | str | None,
    inputs: Callable[[], Mapping[str, Any]] | None,
    *,
    overwrite: bool,
    protected: Path | None,
    progress: Progress,
    tell: Tell,
) -> Iterator[Services]:
    """Yield what a job reports to and goes on from; its `scratch` becomes `out` when the block
    succeeds.

    `inputs`: gives those of `Store.open`, on the rank that writes; None for a job that cannot go
    on. `protected`: the model that is read. Of several ranks the first one alone is heard.
    """
    place, log = None if out is None else Path(os.path.abspath(out)), RunLog()
    store, directory = Store(log=log, label=str(place)), None
    if not is_first():
        progress, tell = silent, mute
    if place is not None and size() > 1:
        # Refuse it on all ranks before they wait for the first one.
        from_first(lambda: check_replaceable(place, overwrite=overwrite, protected=protected))
    with ExitStack() as job:
        if place is not None and is_first():
            if inputs is not None:
                steps = Store.open(
                    place, inputs(), log, overwrite=overwrite, protected=protected, tell=tell
                )
                store = job.enter_context(steps)
            target = staging(place, overwrite=overwrite, protected=protected, tell=tell)
            directory = job.enter_context(target)
        yield Services(
            progress=log.watched(progress), log=log, store=store, scratch=directory, tell=tell
        )


def place_beside(out: Path) -> Path:
    """Return the path of the store of a run that writes `out`. Raises CheckpointError for `/`."""
    if not out.name:
        raise CheckpointError(f"OUT {out}: is the root of the file system; choose a new directory.")
    return out.with_name(f".{out.name}.resume")


def _plain(value: Any) -> Any:
    """Return a record as a mapping, and what JSON does not know as text."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


class _Name(NamedTuple):
    """What a step is known by, as its record says it."""

    step: str
    depends_on: Mapping[str, Any] | None = None
    is_input: bool = False

    @property
    def stem(self) -> str:
        """The name of the step's files."""
        if self.depends_on is None:
            return f"{INPUT}{self.step}" if self.is_input else self.step
        key = hashlib.sha256(
            json.dumps([self.step, self.depends_on], sort_keys=True).encode()
        ).hexdigest()[:16]
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.step)}-{key}"


def _sealed(record: Record) -> bytes:
    """Return the record as JSON that begins with the sha256 of what follows."""
    body = json.dumps(record, indent=1, default=str)[1:].encode() + b"\n"
    return _seal_of(body) + body


def _seal_of(body: bytes) -> bytes:
    return _SEAL % hashlib.sha256(body).hexdigest().encode()


def _intact(path: Path) -> Record | None:
    """Return the file's record; None if a byte of it or of its tensors has changed, or it is
    another step's.
    """
    try:
        raw = path.read_bytes()
        body = raw[_SEAL_BYTES:]
        if raw[:_SEAL_BYTES] != _seal_of(body):
            return None
        record = json_of(raw)
        if "tensors" in record and sha256_of(path.with_suffix(".safetensors")) != record["tensors"]:
            return None
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        return None
    except ValueError:  # sealed by another program, which may have written anything
        return None
    return record if _is_whole(record, path.stem) else None


def _digests(directory: Path) -> dict[str, str]:
    """Return the sha256 of every file below the directory, by its path in it."""
    return {name: sha256_of(directory / name) for name in files_in(directory)}


def _is_whole(record: Record, stem: str) -> bool:
    """Whether the record is of the step, and has what its readers take from it."""
    if stem == INPUTS:
        return isinstance(record.get("inputs"), dict)
    kinds: dict[str, Any] = {"step": str, "depends_on": dict | None, "is_input": bool}
    kinds |= {"line": dict} if "tensors" in record else {"value": object, "lines": list}
    has_all = all(key in record and isinstance(record[key], kind) for key, kind in kinds.items())
    is_of_step = has_all and _Name(*(record[part] for part in _Name._fields)).stem == stem
    return is_of_step and all(isinstance(line, dict) for line in record.get("lines", ()))


def changes_of(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """Return differences such as "recipe remove was 0.2 and is 0.3"; digests "have changed"."""
    changed: list[str] = []
    for key in sorted({*before, *now}):
        old, new, name = before.get(key), now.get(key), f"{where} {key}".strip()
        if isinstance(old, dict) and isinstance(new, dict):
            changed += changes_of(old, new, name)
        elif old != new:
            is_digest = any(_DIGEST.fullmatch(str(value)) for value in (old, new))
            changed.append(f"{name} has changed" if is_digest else f"{name} was {old} and is {new}")
    return changed


def _finished(directory: Path) -> list[str]:
    """Return the names of finished steps, without inputs."""
    stems = sorted(file.stem for file in directory.glob("[!.]*.json"))
    return [stem for stem in stems if stem != INPUTS and not stem.startswith(INPUT)]


def _is_outlived(directory: Path, out: Path) -> bool:
    """Whether `out` is newer than the store: its run was killed before removing the store."""
    if not (os.path.isdir(directory) and out.is_dir()):
        return False
    return out.stat().st_mtime >= max(
        (file.stat().st_mtime for file in directory.iterdir()), default=0.0
    )


def _remove(directory: Path, made: list[Path]) -> None:
    (directory / f"{INPUTS}.json").unlink(missing_ok=True)  # a half-removed store is void
    shutil.rmtree(directory, ignore_errors=True)
    remove_empty(made)


def _lock(directory: Path, out: Path) -> int:
    """Return a descriptor that locks the directory until it is closed."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not directory.is_dir() or not os.path.samestat(os.fstat(descriptor), directory.stat()):
            raise BlockingIOError  # its owner has just removed it
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"OUT {out}: another process is writing it; wait for its end, or choose another "
            "directory."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return descriptor
