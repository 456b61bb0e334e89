"""Each command draws progress: bars on a terminal, lines on standard error without one, times of each stage anew."""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from rich.console import Console
from run_cli import run_cli

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


def said(capsys: Any, steps: Iterable[tuple[float, str, int, int]]) -> list[str]:
    """Return the lines about stages: (seconds, stage, done, total)."""
    steps = list(steps)
    clock = iter([0.0, *(seconds for seconds, *_ in steps)])
    listen = _lines(lambda: next(clock))
    for _, *step in steps:
        listen(*step)
    told = capsys.readouterr()
    assert told.out == ""
    return told.err.splitlines()


def test_lines_of_stages(capsys):
    """One as a stage begins, then one every ten seconds with what is left at its speed so far."""
    layers = ((4.0 * layer, "prune", layer, 30) for layer in range(31))
    hours = (36_000, "check", 2, 4000), (36_500, "check", 1002, 4000), (36_700, "check", 2002, 4000)
    assert said(capsys, [(0, "load", 0, 1), (0, "load", 1, 1), *layers, (124, "verify", 0, 1), *hours]) == [
        "0:00:00 load",
        "0:00:00 prune",
        *(f"0:00:{4 * n:02} prune: {n} of 30, about 0:01:{48 - 4 * (n - 3):02} left" for n in (3, 6, 9, 12)),
        "0:01:00 prune: 15 of 30, about 0:01:00 left",
        *(f"0:01:{4 * n - 60:02} prune: {n} of 30, about 0:00:{120 - 4 * n:02} left" for n in (18, 21, 24, 27)),
        "0:02:04 verify",
        "10:00:00 check",
        "10:11:40 check: 2,002 of 4,000, about 0:11:39 left",
    ]


def test_what_is_left_is_told_once_a_hundredth_is_done(capsys):
    """The first step of a stage may read what all others need: ten hours were foretold for minutes."""
    steps = ((20.0 * number, "answers", done, 10_000) for number, done in enumerate((0, 99, 100, 5_000)))
    assert said(capsys, steps) == [
        "0:00:00 answers",
        "0:00:20 answers: 99 of 10,000",
        "0:00:40 answers: 100 of 10,000, about 1:06:00 left",
        "0:01:00 answers: 5,000 of 10,000, about 0:01:00 left",
    ]


def test_a_stage_that_goes_back_has_begun_anew(capsys):
    """What is left follows from the speed of this time, not from the hours between two of a grid's cells."""
    assert said(capsys, ((start + 100.0 * at, "piqa", at, 3) for start in (0, 5_000) for at in range(4))) == [
        "0:00:00 piqa",
        "0:01:40 piqa: 1 of 3, about 0:03:20 left",
        "0:03:20 piqa: 2 of 3, about 0:01:40 left",
        "1:23:20 piqa: 0 of 3",
        "1:25:00 piqa: 1 of 3, about 0:03:20 left",
        "1:26:40 piqa: 2 of 3, about 0:01:40 left",
    ]
