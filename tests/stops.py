"""Runs that end before they are done, as if their process had been killed, and what they leave and write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from secateur.store import Store, place_beside


class Stopped(Exception):
    """Stands for whatever ends a process."""


class stopped_after:
    """Within the context the run stops once it has written that many more records, the text's included."""

    def __init__(self, num_steps: int) -> None:
        self.left, self.patches = num_steps, []

    def __enter__(self) -> None:
        for method in ("save", "value"):
            whole = getattr(Store, method)

            def counted(store: Store, *args: Any, _whole: Any = whole, **options: Any) -> Any:
                before = store.num_saved
                found = _whole(store, *args, **options)
                self.left -= store.num_saved - before
                if self.left <= 0 and store.num_saved > before:
                    raise Stopped
                return found

            self.patches.append(patch.object(Store, method, counted))
            self.patches[-1].start()

    def __exit__(self, *error: object) -> None:
        for each in self.patches:
            each.stop()


def stopped_again_and_again(run: Callable[[], object], out: Path, first: int, more: int) -> None:
    """Stop the run after `first` records, then each time after `more` more, until `out` is there.

    The first record is the text, an input, without which nothing is kept.
    """
    before, num_stops = set(out.parent.iterdir()), 0
    while not out.exists():
        try:
            with stopped_after(first + more * num_stops):
                run()
        except Stopped as stop:
            num_stops += 1
            assert stop.__notes__ and set(out.parent.iterdir()) - before == {place_beside(out)}
    assert num_stops >= 2


def killed_in(stage: str, behind: float = 0.6) -> Callable[[str, int, int], None]:
    """Return a listener that stops the run behind this share of a stage, below 0 as it begins: the run has no say."""

    def listen(name: str, done: int, total: int) -> None:
        if name == stage and done > behind * total:
            raise Stopped

    return listen


def lines_of(out: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's log, or those of one event."""
    lines = map(json.loads, (out / "run.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if event in (None, line["event"])]


def weights(out: Path) -> dict[str, bytes]:
    """Return what must be the same bytes, by its path inside the result."""
    names = ("model.safetensors", "config.json", "keep.json", "recipe.yaml")
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.name in names}
