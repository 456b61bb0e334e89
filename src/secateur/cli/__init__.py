"""The command line: few commands, few flags; a recipe holds what else a run needs.

A user's mistake ends in one sentence on standard error and exit status 2, Ctrl-C in status 130,
SIGTERM in 143. An interrupted run leaves nothing but the steps that it can resume from. Results go
to standard output, progress to standard error. Importing a command's module registers it; `--help`
has them in that order.
"""

import os
import sys
from pathlib import Path

import psutil

from secateur.cli import measure, prune
from secateur.cli.common import STOPPED_BY, app, last_word, launched, stoppable
from secateur.errors import SecateurError
from secateur.files import disk_errors

BUSY_PERCENT = 25  # of all cores, used by others

__all__ = ["app", "main", "measure", "prune"]


def main() -> None:
    """Run the command line."""
    try:
        with stoppable(), disk_errors(Path("standard output")):
            give_way()
            with launched():
                app(prog_name="secateur")
    except SecateurError as error:
        _say(str(error), *(f"{note}." for note in getattr(error, "__notes__", ())))
        sys.exit(2)
    except SystemExit as end:
        if end.code in STOPPED_BY:
            _say(f"{'; '.join(['interrupted', *getattr(end, '__notes__', ())])}.")
        raise


def give_way() -> None:
    """Where other programs run, let threads that wait for each other sleep; torch reads this as it
    is imported.

    On an idle machine spinning is a tenth faster. On a busy one it takes the cores from those
    waited for. The load average would count what the user ran a minute ago, so the cores are
    watched for a moment.
    """
    if psutil.cpu_percent(interval=0.1) > BUSY_PERCENT:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _say(*sentences: str) -> None:
    """Print once, for all ranks, why the run ends."""
    text = last_word("\nsecateur: ".join(sentences))
    if text is not None:
        print(f"secateur: {text}", file=sys.stderr)
