"""What a long stage reports to: a stage name, how far it is, how much there is. The command line draws a bar from it.

A library call without a listener uses `silent`. Stages never print.
"""

from collections.abc import Callable

# progress(stage, done, total): `done` and `total` in the stage's own steps, done = 0 when it starts.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""
