"""What the stages of a job are to take, as their progress tells it, beside what they took."""

from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from secateur.log import RunLog


def foretold(monkeypatch: pytest.MonkeyPatch, stage: str, steps: Iterable[tuple[float, int, int]]) -> list[float]:
    """Return what is foretold of steps (seconds, done, total), which the listener behind it hears too."""
    log, clock, heard = RunLog(), SimpleNamespace(now=0.0), list[tuple[str, int, int]]()
    monkeypatch.setattr("secateur.log.time", SimpleNamespace(perf_counter=lambda: clock.now))  # each look takes none
    listen, steps = log.watched(lambda *step: heard.append(step)), list(steps)
    for clock.now, *step in steps:
        listen(stage, *step)
    assert heard == [(stage, *step) for _, *step in steps]
    return log.foretold[stage]


def test_a_stage_is_foretold_at_its_first_step_and_behind_two_layers_of_32(monkeypatch) -> None:
    # The first layer is slower.
    steps = ((0 if layer == 0 else 6 + 4 * layer, layer, 32) for layer in range(33))
    assert foretold(monkeypatch, "prune", steps) == [32 * 10, 16 * (10 + 4), 10 + 31 * 4]
    # What is not yet a hundredth tells nothing.
    steps = ((5 * number, done, 1000) for number, done in enumerate((0, 9, 10, 500, 1000, 1000)))
    assert foretold(monkeypatch, "answers", steps) == [1000, 30, 20]


def test_a_stage_that_goes_on_or_begins_anew_has_a_clock_of_its_own(monkeypatch) -> None:
    goes_on = [(100, 50, 100), (108, 60, 100), (116, 100, 100)]
    assert foretold(monkeypatch, "polish", goes_on) == [8 / 0.2, 16.0]  # too few steps for a second telling
    anew = ((124 + done, done, 3) for done in range(4))
    assert foretold(monkeypatch, "polish", [*goes_on, *anew]) == [3, 3, 3]
    half = ((200 + done, done, 150) for done in (75, 80, 150))  # what an earlier call wrote took none of its seconds
    assert foretold(monkeypatch, "answers", [*goes_on, *half]) == [75, 75]
