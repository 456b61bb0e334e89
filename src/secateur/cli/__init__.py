"""The command line. Few commands, few flags; what a run needs beyond them is in the recipe.

A user's mistake ends in one sentence on standard error and exit status 2; Ctrl-C in exit status 130. Results go to
standard output, progress to standard error. One module per command; importing it registers the command.
"""

import sys

from secateur.cli import prune
from secateur.cli.app import app
from secateur.errors import SecateurError

__all__ = ["app", "main", "prune"]


def main() -> None:
    """Run the command line."""
    try:
        app()
    except SecateurError as error:
        print(f"secateur: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("secateur: interrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)
