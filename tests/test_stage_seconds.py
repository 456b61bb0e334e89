"""What the stages of a job are to take, as their progress tells it, beside what they took."""

import pytest

from secateur.log import RunLog, silent


class Clock:
    """Seconds that a test moves. Each look takes none."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("secateur.log.time", clock)
    return clock


def test_a_stage_is_foretold_at_its_first_step_and_behind_two_layers_of_32(clock: Clock) -> None:
    log, heard = RunLog(), list[tuple[str, int, int]]()
    listen = log.watched(lambda *step: heard.append(step))
    for layer in range(33):
        listen("prune", layer, 32)
        clock.now += 10 if layer == 0 else 4  # the first layer is slower
    assert log.foretold == {"prune": [32 * 10, 16 * (10 + 4), 10 + 31 * 4]}
    assert heard == [("prune", layer, 32) for layer in range(33)]


def test_what_is_not_yet_a_hundredth_tells_nothing(clock: Clock) -> None:
    log = RunLog()
    listen = log.watched(silent)
    for done in (0, 9, 10, 500, 1000, 1000):
        listen("answers", done, 1000)
        clock.now += 5
    assert log.foretold == {"answers": [1000, 30, 20]}


def test_a_stage_that_goes_on_or_begins_anew_has_a_clock_of_its_own(clock: Clock) -> None:
    log = RunLog()
    listen = log.watched(silent)
    clock.now = 100.0
    for done in (50, 60, 100):
        listen("polish", done, 100)
        clock.now += 8
    assert log.foretold["polish"] == [8 / 0.2, 16.0]  # too few steps for a second telling
    for done in (0, 1, 2, 3):
        listen("polish", done, 3)
        clock.now += 1
    assert log.foretold["polish"] == [3, 3, 3]
