"""The device checks, in a process of their own: torch does not forget a device that it was once told of."""

import os
import sys
from pathlib import Path

from warm import WarmProcesses


def test_devices(warm: WarmProcesses) -> None:
    checks = Path(__file__).parents[1].joinpath("device_checks.py")
    # The warning is about what is imported already.
    options = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    done = warm.run([sys.executable, "-m", "pytest", *options, str(checks)], env=dict(os.environ))
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
