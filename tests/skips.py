"""What a run of the tests left out, and why: one line per reason with its count, before pytest's closing line.

`conftest.py` imports the hook, which pytest finds there.
"""

from collections import Counter
from typing import Any

OUTCOMES = {"skipped": "skipped", "xfailed": "failed as expected", "xpassed": "passed, though a failure was expected"}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the lines; a module that is skipped as a whole counts once."""
    for outcome, said in OUTCOMES.items():
        reports = terminalreporter.stats.get(outcome, [])
        for reason, count in sorted(Counter(map(_reason, reports)).items()):
            terminalreporter.write_line(f"{said}, {count}: {reason}")


def _reason(report: Any) -> str:
    if hasattr(report, "wasxfail"):
        return report.wasxfail.removeprefix("reason: ")
    # (file, line, text) of a skip
    return str(report.longrepr[-1]).removeprefix("Skipped: ")
