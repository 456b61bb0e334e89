"""What a long job reports: progress to a listener, lines to `run.jsonl`, seconds by stage; amounts
for people.
"""

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from secateur.plugins import plugin_packages

T = TypeVar("T")
# progress(stage, done, total): steps of the stage; done = 0 at the start.
Progress = Callable[[str, int, int], None]
# tell(text): a line about the run that is not a result.
Tell = Callable[[str], None]


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def mute(text: str) -> None:
    """Tell nobody."""


def steps(progress: Progress, stage: str, items: Collection[T]) -> Iterator[T]:
    """Yield the items; `progress` hears how many of them are done."""
    for done, item in enumerate(items):
        progress(stage, done, len(items))
        yield item
    progress(stage, len(items), len(items))


def bars() -> Progress:
    """Return a listener that draws a bar per stage, in Jupyter as a widget:
    `progress=secateur.bars()`.
    """
    from tqdm.auto import tqdm

    drawn: dict[str, tqdm] = {}

    def listen(stage: str, done: int, total: int) -> None:
        if stage not in drawn:
            if done >= total:
                return
            drawn[stage] = tqdm(total=total, desc=stage)
        bar = drawn[stage]
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:  # the stage may come again
            drawn.pop(stage).close()

    return listen


LOG_FILE = "run.jsonl"
# What a stage takes is told once the first share of it is done, as its first step may cost as much
# as a hundred others; anew behind the second one, two layers of 32; and in the end.
TELLING_SHARES = (0.01, 1 / 16, 1.0)


class RunLog:
    """Lines in memory and, from `append_to` on, in a directory's `run.jsonl`.

    `foretold`: by stage of the progress, seconds as told at first, as told anew, and as it took.
    """

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.foretold: dict[str, list[float]] = {}
        self._path: Path | None = None

    def append_to(self, directory: Path) -> None:
        """Also write to the directory's `run.jsonl`."""
        self._path, lines, self.lines = directory / LOG_FILE, self.lines, []
        for line in lines:
            self.write(line)

    def part(self) -> "RunLog":
        """Return a log that goes on from these lines by itself, with the same clock."""
        log = RunLog()
        log.lines, log.seconds, log.foretold = list(self.lines), self.seconds, self.foretold
        return log

    def watched(self, progress: Progress) -> Progress:
        """Return a listener that also notes what stages are to take, at the speed that they
        have.
        """
        begun: dict[str, tuple[float, int]] = {}
        reached: dict[str, int] = {}

        def listen(stage: str, done: int, total: int) -> None:
            progress(stage, done, total)
            # A stage that goes back has begun anew, perhaps from the middle.
            if done < reached.get(stage, done + 1):
                begun[stage], self.foretold[stage] = (time.perf_counter(), done), []
            reached[stage] = done
            (start, before), told = begun[stage], self.foretold[stage]
            share = (done - before) / max(1, total - before)
            if len(told) < len(TELLING_SHARES) and share >= TELLING_SHARES[len(told)]:
                told.append(round((time.perf_counter() - start) / share, 2))

        return listen

    def write(self, line: dict[str, Any]) -> None:
        """Add one line."""
        self.lines.append(line)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    def note(self, text: str) -> None:
        """Write a sentence that people should read."""
        self.write({"event": "note", "text": text})

    @property
    def notes(self) -> tuple[str, ...]:
        """The sentences that people should read."""
        return tuple(line["text"] for line in self.lines if line["event"] == "note")

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the block's seconds to the stage's."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def versions() -> dict[str, str]:
    """Return the versions that a repeat needs, including packages that extend secateur."""
    packages = ("secateur", "torch", "transformers", "safetensors", "tokenizers")
    installed: dict[str, Any] = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **installed, **plugin_packages()}


def human_bytes(num_bytes: int | float) -> str:
    """Return bytes in decimal units: 269,030,000 -> 269.0 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"
