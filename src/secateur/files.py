"""Files: written, they appear complete or not at all; JSON and YAML of others are read within
limits.

In: a path and what to write. Out: the file or directory, first under a hidden name, then renamed.
Errors of the disk become one sentence. In: text. Out: its value, or a ValueError that says why not.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

import yaml

from secateur.errors import CheckpointError, RecipeError, SecateurError, one_line

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another place",
    errno.EFBIG: "no file there may become that large; raise the limit (ulimit -f)",
    errno.EACCES: "permission denied; choose another place or change its permissions",
    errno.EPERM: "permission denied; choose another place or change its permissions",
    errno.EROFS: "it is on a read-only file system; choose another place",
    errno.EIO: "the disk reports an input/output error; choose another disk",
}

# What numpy says, without a number, if not all bytes find place.
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written|Not enough free space to write")
# What tempfile says, which torch may ask as it is imported; the places that it tried follow.
_NO_TEMPORARY = "No usable temporary directory"

# No file that we read nests ten levels. Python's stack ends near a thousand.
MAX_NESTING = 100
_TOO_DEEP = f"it nests more than {MAX_NESTING} levels"


def json_of(text: str | bytes) -> Any:
    """Return the value of JSON. Raises ValueError if it is none or nests too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_levels(value)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises CheckpointError if it does not hold one."""
    try:
        data = json_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON ({error}); download or copy it again."
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must be a JSON object, got {type(data).__name__}.")
    return data


def yaml_of(text: str) -> Any:
    """Return the value of YAML.

    Raises ValueError if it is none, gives a key twice, has an alias or nests too deeply.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (
        yaml.YAMLError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:  # the others: for wrong tags
        raise ValueError(one_line(error)) from None
    _check_levels(value)
    return value


def _check_levels(value: Any) -> None:
    inside = [[value]]
    for _ in range(MAX_NESTING + 1):
        each_of = (
            inner
            for outer in inside
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        )
        inside = [item for item in each_of if isinstance(item, dict | list | tuple)]
    if inside:
        raise ValueError(_TOO_DEEP)


class _Loader(yaml.SafeLoader):
    """Refuses aliases, a dozen of which can stand for billions of values, and keys that YAML would
    take twice.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias, *name; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ValueError(
                    f"line {key.start_mark.line + 1} gives the key {key.value} a second time"
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def hidden_beside(path: Path) -> Path:
    """Return where this process writes what becomes `path`."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path`; when the block succeeds, it is renamed to `path`."""
    staged = hidden_beside(path)
    try:
        yield staged
        sync(staged)
        os.replace(staged, path)
        sync(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    """Return the sha256 of the file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_in(directory: Path, *, hidden: bool = True) -> list[str]:
    """Return the files below the directory by their paths from there, sorted; unless `hidden`
    without those.
    """
    paths = sorted(file.relative_to(directory) for file in directory.rglob("*") if file.is_file())
    return [
        path.as_posix()
        for path in paths
        if hidden or not any(part.startswith(".") for part in path.parts)
    ]


def lies_in(directory: Path, file: Path) -> bool:
    """Whether the file is in the directory, also through links.

    A snapshot of the hub's cache links to the blobs of its repository, which count as its own.
    """
    root, real = directory.resolve(), file.resolve()
    is_blob = root.parent.name == "snapshots" and real.parent == root.parents[1] / "blobs"
    return real.is_relative_to(root) or is_blob


# The key of a recipe whose values are paths, also if nothing is there now.
_KEY_OF_PATHS = "files"


def without_places(value: Any, key: str = "") -> Any:
    """Return a plain value in which every path of this machine is its last part alone.

    Hub ids, URLs and other text stay. `key`: under which the value stands in a mapping.
    """
    if isinstance(value, dict):
        return {name: without_places(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item, key) for item in value]
    if not isinstance(value, str):
        return value
    is_place = value.startswith(("/", "~", "./", "../")) or os.path.exists(value)
    return PurePath(value).name or value if is_place or key == _KEY_OF_PATHS else value


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def is_size(text: str) -> bool:
    """Return whether the text is bytes, as 250MB, and not a number of parameters, as 0.4B."""
    return _SIZE.fullmatch(text.strip().upper()) is not None


_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])B")


def parse_size(key: str, text: str) -> int:
    """Return the bytes of a size such as "5GB". Raises RecipeError naming `key`."""
    amount = _SIZE.fullmatch(text.strip().upper())
    num_bytes = 0 if amount is None else int(float(amount[1]) * _UNITS[amount[2]])
    if num_bytes <= 0:
        raise RecipeError(
            f"{key}: must be a number and KB, MB, GB or TB, such as 5GB, got '{text}'."
        )
    return num_bytes


def parse_count(text: str) -> int:
    """Return a number of parameters such as 0.4B, 400M or 400,000,000. Raises RecipeError."""
    amount = re.fullmatch(
        r"(\d+(?:\.\d+)?)([KMB]?)", text.replace(",", "").replace("_", "").strip().upper()
    )
    if amount is None:
        raise RecipeError(
            "remove.to: must be parameters, such as 0.4B or 400M, or bytes, such as 250MB, got "
            f"'{text}'."
        )
    return round(float(amount[1]) * (_UNITS | {"B": 10**9})[amount[2]])


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn a disk error inside the block into a CheckpointError naming `place`; others pass.

    Sentences about what was written under the hidden name, which is then gone, name `place` too.
    safetensors and tokenizers raise their own exceptions (tokenizers a bare Exception) whose text
    has "(os error 28)".
    """
    try:
        yield
    except SecateurError as error:
        said = str(error).replace(str(hidden_beside(place)), str(place))
        if said != str(error):
            error.args = (f"{said.removesuffix('.')}; nothing was written.",)
        raise
    except BaseException as error:
        rust = re.search(r"\(os error (\d+)\)", str(error))
        system = error if isinstance(error, OSError) else OSError(int(rust[1]) if rust else 0, "")
        if _NO_TEMPORARY in str(system):
            raise CheckpointError(
                f"{system.strerror}; set TMPDIR to a directory that has room and can be written."
            ) from None
        if system.errno not in _DISK_ERRORS and not _SHORT_WRITE.search(str(system)):
            raise
        reason = _DISK_ERRORS.get(system.errno or errno.ENOSPC)
        # The second name of a copy is its target; of a hidden name that of what it becomes is told.
        named = system.filename2 or system.filename or place
        shown = re.sub(r"\.([^/]+)\.(partial-\d+|resume)", r"\1", str(named))
        raise CheckpointError(f"{shown}: {reason}.") from None


def check_free_space(directory: Path, num_bytes: int) -> None:
    """Raise CheckpointError if the disk of `directory` has less than `num_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(
            f"{directory.parent}: the run needs {num_bytes / 1e9:.2f} GB, the disk has "
            f"{free / 1e9:.2f} GB free; free some space or choose another place."
        )


@contextmanager
def staged_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Like `whole_file`, with checks. After any exception an old file stays as it was.

    Raises CheckpointError if `path` exists and `overwrite` is False, or cannot be a file, and for
    disk errors.
    """
    check_file(path, overwrite=overwrite)
    with disk_errors(path), whole_file(path) as staged:
        yield staged
        check_file(path, overwrite=overwrite)  # another process may have made it


def write_text(path: Path, text: str) -> None:
    """Write a file, or replace it, as `staged_file` does."""
    with staged_file(path, overwrite=True) as staged:
        staged.write_text(text, encoding="utf-8")


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if `path` cannot be a file, or exists and must not be replaced."""
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{path}: there is no directory {path.parent}; make it first or choose another place."
        )
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; give the name of a file.")
    if path.exists() and not overwrite:
        raise CheckpointError(
            f"{path}: already exists; choose another name or give --overwrite to replace it."
        )


def missing_parents(out: Path) -> list[Path]:
    """Return the missing directories above `out`, innermost first."""
    return [path for path in out.parents if not os.path.lexists(path)]


def remove_empty(directories: list[Path]) -> None:
    """Remove those of the directories that are empty."""
    for directory in directories:
        with suppress(OSError):  # not empty
            directory.rmdir()


def make_directory(directory: Path, out: Path, *, exist_ok: bool = False) -> None:
    """Make a directory, and its parents. Raises CheckpointError, naming `out`, if it cannot."""
    # Trying is the only sure check: for root every permission looks fine.
    try:
        directory.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise CheckpointError(
            f"OUT {out}: no directory can be made there ({error.strerror}); choose another place."
        ) from None
