"""The device checks, in a process of their own: torch does not forget a device that it was once told of."""

import subprocess
import sys
from pathlib import Path


def test_devices():
    checks = Path(__file__).parents[1].joinpath("device_checks.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, cwd=checks.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
