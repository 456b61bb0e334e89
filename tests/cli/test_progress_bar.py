"""Each command draws progress; a bar that goes back to the start times itself anew."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from run_cli import run_cli

from secateur.cli import common

COMMANDS: dict[str, tuple[object, ...]] = {
    "prune": ("m", "o"),
    "trim": ("m", "o", "--vocabulary", 64),
    "measure": ("m", "o"),
    "recover": ("m", "--teacher", "d", "--out", "o"),
    "compare": ("paper", "o"),
    "evaluate": ("m",),
    "bench": ("m",),
    "export": ("m", "f"),
    "push": ("r", "user/name"),
    "verify": ("r",),
    "inspect": ("m",),
    "demo": ("o",),
}


class HeardError(Exception):
    """Ends the command once it is known whether it draws progress."""


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_draws_progress(command: str, monkeypatch: Any) -> None:
    @contextmanager
    def bar() -> Iterator[None]:
        raise HeardError
        yield

    monkeypatch.setattr(common, "progress_bar", bar)
    with pytest.raises(HeardError):
        run_cli(command, *COMMANDS[command])


def test_a_bar_that_begins_anew_has_a_clock_of_its_own(monkeypatch: Any) -> None:
    now, made = 0.0, list[Any]()

    class Bars(common.RichProgress):
        def __init__(self, *columns: Any, console: Console) -> None:
            super().__init__(*columns, console=console, get_time=lambda: now, auto_refresh=False)
            made.append(self)

    monkeypatch.setattr(common, "RichProgress", Bars)
    terminal = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)
    monkeypatch.setattr(common, "Console", lambda **_: terminal)
    with common.progress_bar() as listen:
        for now in (0.0, 100.0):
            for done in range(4):
                listen("prune", done, 3)
                now += 10
        [bars] = made
        [task] = bars.tasks
        assert (task.description, task.completed, task.total) == ("prune", 3, 3)
        assert task.finished_time == 30, "from the second start to its end"


def test_of_several_sizes_each_is_told(monkeypatch: Any) -> None:
    made = [SimpleNamespace(out=name, summary=f"table of {name}") for name in "ab"]
    monkeypatch.setattr("secateur.prune_sizes", lambda *_, **__: made, raising=False)
    monkeypatch.setattr("secateur.table", lambda summary: summary, raising=False)
    outcome = run_cli("prune", "m", "o", "--remove", "0.1,0.2")
    assert (outcome.status, outcome.stdout.split("\n")[::2]) == (0, ["table of a", "table of b", ""]), outcome.stderr
