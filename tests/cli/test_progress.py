"""Each command draws progress: bars on a terminal, lines on standard error without one, times of each stage anew."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from rich.console import Console
from run_cli import run_cli
from shown import assert_shown

from secateur.cli import common
from secateur.cli.common import _lines

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
        for now, first in ((0.0, 0), (100.0, 0), (200.0, 1)):
            for done in range(first, 4):
                listen("prune", done, 3)
                now += 10
            [bars] = made
            [task] = bars.tasks
            assert (task.description, task.completed, task.total) == ("prune", 3, 3)
            assert task.finished_time == 10 * (3 - first), "from this start to its end"


def test_lines_of_stages(capsys):
    """One as a stage begins, then one every ten seconds with what is left at its speed so far."""
    layers = ((4.0 * layer, "prune", layer, 30) for layer in range(31))
    hours = (36_000, "check", 2, 4000), (36_500, "check", 1002, 4000), (36_700, "check", 2002, 4000)
    counts = enumerate((0, 99, 100, 5_000))
    cases = {
        "seconds, and hours": [(0, "load", 0, 1), (0, "load", 1, 1), *layers, (124, "verify", 0, 1), *hours],
        # Ten hours were foretold for minutes.
        "a first step that reads what all need": [(20.0 * n, "answers", done, 10_000) for n, done in counts],
        # What is left follows from the speed of this time, not from the hours between two of a grid's cells.
        "anew": [(start + 100.0 * done, "piqa", done, 3) for start in (0, 5_000) for done in range(4)],
    }
    shown = list[str]()
    for name, steps in cases.items():
        clock = iter([0.0, *(seconds for seconds, *_ in steps)])
        listen = _lines(lambda clock=clock: next(clock))
        for _, *step in steps:
            listen(*step)
        told = capsys.readouterr()
        assert told.out == ""
        shown += [name, *(f"    {line}" for line in told.err.splitlines())]
    assert_shown("cli/progress", "\n".join(shown))
