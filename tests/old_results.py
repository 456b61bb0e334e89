"""The least directory that `--overwrite` replaces: one file, and a `result.json` with its digest."""

from dataclasses import dataclass, field
from pathlib import Path

from secateur.facts import Record
from secateur.result_directory import write_summary


@dataclass(frozen=True, slots=True)
class Written(Record):
    """The least that a `result.json` says."""

    files: dict[str, str] = field(default_factory=dict[str, str])


def old_result(directory: Path, config: str = "old") -> Path:
    """Make the directory, as secateur writes it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(config)
    write_summary(directory, Written())
    return directory
