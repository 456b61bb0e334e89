"""A result directory: it appears whole or not at all, its files have digests, and only such a one
is replaced.

In: a directory to write, or one that was written. Out: its `result.json`, with the sha256 of every
file of the run; what differs from it; or a CheckpointError that says why OUT cannot be written. The
digests tell of damage, not of forgery: who changes a file on purpose can change its digest too.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from secateur.errors import CheckpointError
from secateur.facts import Record
from secateur.files import (
    disk_errors,
    files_in,
    hidden_beside,
    make_directory,
    missing_parents,
    remove_empty,
    sha256_of,
    sync,
)
from secateur.log import Progress, Tell, mute, steps
from secateur.ranks import is_alive

RESULT_FILE = "result.json"
BENCH_FILE, EVALUATION_FILE = "bench.json", "evaluation.json"
PAGE_FILE = "report.html"
PARTS_FOLDER = "evaluation"  # where `evaluate` keeps what it has finished
# Later commands write these again, so they have no digest.
LATER_FILES = (EVALUATION_FILE, BENCH_FILE, PAGE_FILE)
_PART = re.compile(PARTS_FOLDER + r"/[\w.-]+-[0-9a-f]{16}\.(json|safetensors)")
# A new file of such a kind could change what loading gives; the last two in a folder too.
_LOADED_KINDS = (".safetensors", ".bin", ".json", ".model", ".tiktoken", ".txt", ".py", ".jinja")
_OWN = f'"{RESULT_FILE}": "%s"'
_SEAL = re.compile(rb'(?<="result\.json": ")[0-9a-f]{64}(?=")')
NUM_SHOWN = 4  # names of files in a sentence

Sealed = TypeVar("Sealed", bound=Record)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """What is not as it was written: a file, or the reload."""

    what: str
    expected: str
    found: str


def write_summary(
    directory: Path, summary: Sealed, known: Mapping[str, str] | None = None
) -> Sealed:
    """Write `result.json` with the sha256 of every file there; return the summary with them as its
    `files`.

    `known`: digests of files that are not read again. Its own is that of its bytes without those 64
    characters.
    """
    names, known = (name for name in _names(directory) if name != RESULT_FILE), known or {}
    digests = {name: known.get(name) or sha256_of(directory / name) for name in names}
    text = dataclasses.replace(summary, files=digests | {RESULT_FILE: ""}).to_json()
    own = hashlib.sha256(text.encode()).hexdigest()
    (directory / RESULT_FILE).write_text(text.replace(_OWN % "", _OWN % own, 1), encoding="utf-8")
    return dataclasses.replace(summary, files=digests | {RESULT_FILE: own})


def read_digests(directory: Path) -> dict[str, str] | None:
    """Return the sha256 of every file as `result.json` has it; None if that file is damaged.

    Raises CheckpointError if there is none.
    """
    path = directory / RESULT_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: has no {RESULT_FILE}, so it is no result; give a directory that "
            "secateur prune has written."
        )
    raw = path.read_bytes()
    seal = _SEAL.search(raw)
    if seal and hashlib.sha256(_SEAL.sub(b"", raw, count=1)).hexdigest() == seal[0].decode():
        return json.loads(raw)["files"]
    return None


def mismatches(directory: Path, digests: dict[str, str], progress: Progress) -> Iterator[Mismatch]:
    """Yield what differs from the digests: changed, missing, and new files that loading may
    read.
    """
    for name, expected in steps(progress, "sha256", digests.items()):
        path = directory / name
        if not path.is_file():
            yield Mismatch(name, f"sha256 {expected}", "no such file")
        elif name != RESULT_FILE and (sha256 := sha256_of(path)) != expected:
            yield Mismatch(name, f"sha256 {expected}", f"sha256 {sha256}")
    for name in _names(directory):
        if name not in digests and name.endswith(
            _LOADED_KINDS[-2:] if "/" in name else _LOADED_KINDS
        ):
            yield Mismatch(name, "no such file", "a file that is not of the result")


def _names(directory: Path) -> list[str]:
    """Return the files that have a digest, by their path from the directory; hidden ones have
    none.
    """
    return sorted(name for name in files_in(directory, hidden=False) if name not in LATER_FILES)


@contextmanager
def staging(
    out: Path,
    *,
    overwrite: bool,
    protected: Path | None = None,
    tell: Tell = mute,
) -> Iterator[Path]:
    """Yield a hidden empty directory; when the block succeeds, it is renamed to `out`.

    After any exception nothing is left, neither the directory nor new parents. With `overwrite` an
    old result stays until the new one is complete. `protected`, the model being read, and the
    directories above it are never replaced. `tell`: see `restore`.

    Raises CheckpointError, before the block, if `out` exists or cannot be made, and for disk
    errors.
    """
    out = Path(os.path.abspath(out))
    restore(out, tell)
    check_replaceable(out, overwrite=overwrite, protected=protected)
    made = missing_parents(out)
    staged = hidden_beside(out)
    shutil.rmtree(staged, ignore_errors=True)  # from a killed process with this id
    try:
        make_directory(staged, out)
        with disk_errors(out):
            yield staged
            for root, _, files in os.walk(staged):
                for name in (*files, ""):
                    sync(Path(root, name))
            check_replaceable(
                out, overwrite=overwrite, protected=protected
            )  # it may have changed meanwhile
            _swap(staged, out)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        remove_empty(made)
        raise


def check_replaceable(out: Path, *, overwrite: bool, protected: Path | None) -> None:
    """Raise CheckpointError if `out` must not be written: what is there is not ours, or is being
    read.

    With `overwrite` an empty directory may be replaced, and a result of which every file is as
    secateur wrote it, or is one that a later command writes. A directory of several results is not:
    they may be of several runs.
    """
    try:
        real = out.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError(
            f"OUT {out}: its links lead in a circle; choose another place."
        ) from None
    if protected is not None and real in (protected.resolve(), *protected.resolve().parents):
        raise CheckpointError(
            f"OUT {out}: holds the model that is being pruned; choose another directory."
        )
    # A directory of .gguf files is no model's own.
    if (
        protected is not None
        and (protected / "config.json").is_file()
        and protected.resolve() in real.parents
    ):
        raise CheckpointError(
            f"OUT {out}: is inside the model's directory {protected}; choose one outside of it."
        )
    check_outside_results(out)
    blocking = next((parent for parent in out.parents if os.path.lexists(parent)), out)
    if not blocking.is_dir():
        raise CheckpointError(f"OUT {out}: {blocking} is not a directory; choose another place.")
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir() or out.is_mount():
        kind = (
            "a symbolic link" if out.is_symlink() else "a mount point" if out.is_dir() else "a file"
        )
        raise CheckpointError(
            f"OUT {out}: is {kind}, which is never replaced; choose a new directory."
        )
    if not overwrite:
        raise CheckpointError(
            f"OUT {out}: already exists; choose a new directory or give --overwrite to replace it."
        )
    digests = (read_digests(out) if (out / RESULT_FILE).is_file() else None) or {}
    if theirs := _of_the_user(out, digests):
        is_result = (
            ""
            if digests
            else f"is no result of secateur (it has no {RESULT_FILE} with its digest), and "
        )
        shown, more = ", ".join(theirs[:NUM_SHOWN]), len(theirs) - NUM_SHOWN
        listed = f"{shown} and {more:,} more" if more > 0 else shown
        raise CheckpointError(
            f"OUT {out}: {is_result}--overwrite would delete what is not as secateur wrote it: "
            f"{listed}; move it elsewhere, or choose a new directory."
        )


def check_outside_results(out: Path) -> None:
    """Raise CheckpointError if `out` is inside a result: a result has no files but its own."""
    for parent in out.resolve().parents:
        if os.path.isfile(parent / RESULT_FILE) and read_digests(parent) is not None:
            raise CheckpointError(
                f"OUT {out}: is inside the result {parent}; choose a directory outside of it."
            )


def _of_the_user(directory: Path, digests: Mapping[str, str]) -> list[str]:
    """Return the files, links and unreadable folders that secateur did not write, or that were
    changed since.
    """
    unreadable, theirs = list[OSError](), list[str]()
    for root, folders, files in os.walk(directory, onerror=unreadable.append):
        # Links to folders are not followed.
        links = [name for name in folders if Path(root, name).is_symlink()]
        for path in (Path(root, name) for name in (*files, *links)):
            name = path.relative_to(directory).as_posix()
            is_file = path.is_file() and not path.is_symlink()
            is_later = name in LATER_FILES or _PART.fullmatch(name) is not None
            if is_file and digests and (is_later or name == RESULT_FILE):
                continue
            if not is_file or name not in digests:
                theirs.append(name)
            elif _sha256_at(path, path.stat().st_size, path.stat().st_mtime_ns) != digests[name]:
                theirs.append(f"{name} (changed since)")
    theirs += [Path(error.filename).relative_to(directory).as_posix() for error in unreadable]
    # What people look at first: hidden files and deep ones come last.
    return sorted(theirs, key=lambda name: (name.startswith("."), name.count("/"), name))


@functools.cache
def _sha256_at(file: Path, size: int, changed_ns: int) -> str:
    """Return the sha256 of the file, which is read once as long as size and time of change stay."""
    return sha256_of(file)


def restore(out: Path, tell: Tell = mute) -> None:
    """Remove what killed processes left beside `out`; bring `out` back if one had moved it aside,
    and `tell` so.
    """
    beside = os.listdir(out.parent) if os.path.isdir(out.parent) else []
    for name in (name for name in beside if name.startswith(f".{out.name}.")):
        kind, _, process = name.removeprefix(f".{out.name}.").rpartition("-")
        if kind not in ("partial", "replaced") or not process.isdecimal():
            continue
        # In a container a new process often has the number of the one before.
        is_namesake = kind == "replaced" and int(process) == os.getpid()
        if is_alive(int(process)) and not is_namesake:
            continue
        if kind == "replaced" and not os.path.lexists(out):
            out.with_name(name).rename(out)
            tell(
                f"OUT {out}: a run was killed while it replaced this directory, so the old result "
                "is back there."
            )
        else:
            shutil.rmtree(out.with_name(name), ignore_errors=True)


def _swap(staged: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    replacing = out.exists()
    if replacing:
        out.rename(old)
    try:
        staged.rename(out)
    finally:
        if replacing and not out.exists():
            old.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)
