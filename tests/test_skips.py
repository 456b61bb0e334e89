"""Skips are seen: each reason with its count, and pytest's own line stays the last one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import conftest
import skips

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_tool(number):
    pytest.skip("needs a tool")

@pytest.mark.skipif(True, reason="no browser")
def test_page(): ...

@pytest.mark.xfail(reason="not exported yet")
def test_export():
    assert False

@pytest.mark.xfail(reason="thought to be broken")
def test_works(): ...

def test_module():
    pytest.importorskip("no_such_module")

def test_plain(): ...
"""
LINES = [
    "skipped, 1: could not import 'no_such_module': No module named 'no_such_module'",
    "skipped, 3: needs a tool",
    "skipped, 1: no browser",
    "failed as expected, 1: not exported yet",
    "passed, though a failure was expected, 1: thought to be broken",
]


def test_every_reason_has_a_line_with_its_count_before_the_closing_line(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text('import pytest\npytest.skip("whole file", allow_module_level=True)\n')
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "skips"]
    environment = os.environ | {"PYTHONPATH": str(Path(skips.__file__).parent), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    *before, closing = done.stdout.strip().splitlines()
    said = [line for line in before if re.match(r"(skipped|failed|passed)\b.*, \d+: ", line)]
    assert sorted(said) == sorted([*LINES, "skipped, 1: whole file"])
    assert closing.startswith("1 passed, 6 skipped, 1 xfailed, 1 xpassed in ")


def test_every_run_has_the_hook():
    assert conftest.pytest_terminal_summary is skips.pytest_terminal_summary
