"""The command line as one of several ranks that torchrun or `accelerate launch` started; with one process, nothing.

torch is imported only where there are ranks, so that --help and option errors do not wait for it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from secateur.errors import RecipeError

IN_ONE_PROCESS = frozenset({"bench", "export", "inspect", "report"})


def has_ranks() -> bool:
    """Say whether a launcher started more than one process."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def launched() -> Iterator[None]:
    """Join the other ranks while the block runs, and leave together with them.

    Raises RecipeError for a command that runs in one process, RankError if not all ranks start.
    """
    if not has_ranks():
        yield
        return
    from secateur.ranks_group import joined

    with joined():
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        if command in IN_ONE_PROCESS:
            raise RecipeError(
                f"{command}: runs in one process, got {os.environ['WORLD_SIZE']} ranks; start it without torchrun."
            )
        try:
            yield
        except SystemExit as end:  # how the command line ends well, too
            if end.code:
                raise


def last_word(sentence: str) -> str | None:
    """Return what to print of why this process ends; None if another rank prints it."""
    if not has_ranks():
        return sentence
    from secateur.ranks_group import last_word

    return last_word(sentence)
