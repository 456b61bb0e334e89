"""The run's log."""

import json
from pathlib import Path

from secateur.log import LOG_FILE, RunLog


def test_half_a_line_of_a_run_that_ended_early_goes(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_text('{"event": "step", "step": 1}\n{"event": "st')
    RunLog(tmp_path).write({"event": "step", "step": 2})
    lines = (tmp_path / LOG_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_first_line_cut_short_goes_too(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_text('{"event"')
    RunLog(tmp_path).write({"event": "step"})
    assert (tmp_path / LOG_FILE).read_text() == '{"event": "step"}\n'
