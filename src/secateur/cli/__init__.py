"""The command line. Few commands, few flags; what a run needs beyond them is in the recipe.

A user's mistake ends in one sentence on standard error and exit status 2; Ctrl-C in exit status 130, SIGTERM in 143,
both with nothing left behind. Results go to standard output, progress to standard error. One module per command;
importing it registers the command.
"""

import signal
import sys

from secateur.cli import bench, compare, evaluate, export, prune, recover, report
from secateur.cli.app import app
from secateur.cli.launched import last_word, launched
from secateur.errors import SecateurError

__all__ = ["app", "bench", "compare", "evaluate", "export", "main", "prune", "recover", "report"]

STOPPED_BY = {128 + number: number for number in (signal.SIGINT, signal.SIGTERM)}


def main() -> None:
    """Run the command line."""
    handlers = {number: signal.signal(number, _stop) for number in STOPPED_BY.values()}
    try:
        with launched():
            app()
    except SecateurError as error:
        _say(str(error))
        sys.exit(2)
    except SystemExit as end:
        if end.code in STOPPED_BY:
            _say("interrupted.")
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _say(sentence: str) -> None:
    """Print why the run ends: once, however many ranks end with it."""
    said = last_word(sentence)
    if said is not None:
        print(f"secateur: {said}", file=sys.stderr)


def _stop(number: int, frame: object) -> None:
    # An exception and not the default action, so that half-written directories are removed on the way out; and not
    # KeyboardInterrupt, which typer turns into an exit of its own.
    raise SystemExit(128 + number)
