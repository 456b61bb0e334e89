"""The command line run inside the test process: `secateur.cli.main`, with what it printed and its exit status."""

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest.mock import patch

from secateur.cli import main


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int
    stdout: str
    stderr: str


def run_cli(*arguments: object) -> Outcome:
    """Run `secateur ARGUMENTS`."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    argv = ["secateur", *(str(argument) for argument in arguments)]
    with patch.object(sys, "argv", argv), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main()
        except SystemExit as end:
            assert end.code is None or isinstance(end.code, int)
            status = end.code or 0
    return Outcome(status, stdout.getvalue(), stderr.getvalue())
