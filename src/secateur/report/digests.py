"""The sha256 of every file of a result, in its `result.json`. In: a result directory.

They tell of damage, not of forgery: who changes a file on purpose can change its digest too.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.errors import CheckpointError
from secateur.files import sha256_of
from secateur.log import Progress
from secateur.report.measured import BENCH_FILE, EVALUATION_FILE
from secateur.report.records import PAGE_FILE, PICTURE_FILE, RESULT_FILE, Summary

# Later commands write these again, so they have no digest.
LATER_FILES = (EVALUATION_FILE, BENCH_FILE, PAGE_FILE, PICTURE_FILE)
# A new file of such a kind could change what loading gives; the last two in a folder too.
_LOADED_KINDS = (".safetensors", ".bin", ".json", ".model", ".tiktoken", ".txt", ".py", ".jinja")
_OWN = f'"{RESULT_FILE}": "%s"'
_SEAL = re.compile(rb'(?<="result\.json": ")[0-9a-f]{64}(?=")')


@dataclass(frozen=True, slots=True)
class Mismatch:
    """What is not as it was written: a file, or the reload."""

    what: str
    expected: str
    found: str


def write_summary(directory: Path, summary: Summary, known: Mapping[str, str] | None = None) -> Summary:
    """Write `result.json` with the sha256 of every file there; return the summary with them.

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
    if not (directory / RESULT_FILE).is_file():
        raise CheckpointError(
            f"{directory}: has no {RESULT_FILE}, so it is no result; give a directory that secateur prune has written."
        )
    raw = (directory / RESULT_FILE).read_bytes()
    seal = _SEAL.search(raw)
    if seal and hashlib.sha256(_SEAL.sub(b"", raw, count=1)).hexdigest() == seal[0].decode():
        return json.loads(raw)["files"]
    return None


def mismatches(directory: Path, digests: dict[str, str], progress: Progress) -> Iterator[Mismatch]:
    """Yield what differs from the digests: changed, missing, and new files that loading may read."""
    for done, (name, expected) in enumerate(digests.items()):
        progress("sha256", done, len(digests))
        path = directory / name
        if not path.is_file():
            yield Mismatch(name, f"sha256 {expected}", "no such file")
        elif name != RESULT_FILE and (found := sha256_of(path)) != expected:
            yield Mismatch(name, f"sha256 {expected}", f"sha256 {found}")
    progress("sha256", len(digests), len(digests))
    for name in _names(directory):
        if name not in digests and name.endswith(_LOADED_KINDS[-2:] if "/" in name else _LOADED_KINDS):
            yield Mismatch(name, "no such file", "a file that is not of the result")


def _names(directory: Path) -> list[str]:
    """Return the files that have a digest, by their path from the directory; hidden ones have none."""
    paths = [file.relative_to(directory) for file in directory.rglob("*") if file.is_file()]
    shown = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    return sorted(name for name in shown if name not in LATER_FILES)
