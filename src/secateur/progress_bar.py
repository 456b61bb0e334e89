"""The progress bar of the command line, drawn on standard error: stage, bar, steps done, time taken, time left."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from secateur.progress import Progress, silent


@contextmanager
def progress_bar(*, enabled: bool) -> Iterator[Progress]:
    """Yield a listener that draws one bar per stage; a silent one where bars are not wanted."""
    if not enabled:
        yield silent
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bars = RichProgress(*columns, console=Console(stderr=True))
    tasks = {}

    def listen(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            bars.start()  # not before: a run that fails at once prints its one sentence and nothing else
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield listen
    finally:
        if tasks:
            bars.stop()
