"""The journal: what a run has finished, in a directory that outlives it, so that the same run can go on from there.

In: the outcome of a step, as JSON or tensors, and what the run log says of it. Out: the same when it is met again.
One file per step, which appears complete or not at all. A step is only looked up by its name: that the run is the same
one is checked by `resume`. A step that is missing is done again, whichever others are there. Of several ranks the first
one has the directory and tells the others, who ask in the same order.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.ranks import from_first
from secateur.runlog import RunLog
from secateur.whole_file import load_json, load_tensors, save_json, save_tensors


class Journal:
    """`directory` None: nothing is kept. `num_found`: steps that an earlier run had finished; `num_kept`: this one."""

    def __init__(self, log: RunLog | None = None, directory: Path | None = None) -> None:
        self.log = RunLog() if log is None else log
        self.directory = directory
        self.num_found = self.num_kept = 0

    def value(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` gives, which must survive JSON; its log lines are written either way."""
        path = None if self.directory is None else self.directory / f"{name}.json"
        found = from_first(lambda: load_json(path) if path is not None and path.is_file() else None)
        if found is not None:
            for line in found["lines"]:
                self.log.write(line)
            self.num_found += 1
            return found["value"]
        first = len(self.log.lines)
        value = compute()
        if path is not None:
            save_json(path, {"value": value, "lines": self.log.lines[first:]})
            self.num_kept += 1
        return value

    def has(self, name: str) -> bool:
        """Whether `find` would find the step."""
        return from_first(lambda: self._is_there(name))

    def find(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the line that `keep` got; None if the step is not finished."""
        found = from_first(lambda: load_tensors(self._path(name)) if self._is_there(name) else None)
        self.num_found += found is not None
        return found

    def keep(self, name: str, tensors: dict[str, Tensor], line: dict[str, Any]) -> None:
        """Note a finished step: its tensors and a line, which the caller logs."""
        if self.directory is not None:
            save_tensors(self._path(name), tensors, line)
            self.num_kept += 1

    def _is_there(self, name: str) -> bool:
        return self.directory is not None and self._path(name).is_file()

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}.safetensors"
