"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.app import app
from secateur.errors import RecipeError


@app.command(epilog="Example: secateur report smaller")
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR", help="A result of secateur prune.")],
) -> None:
    """Write report.html into DIR anew from its files."""
    # Imported here so that --help and option errors do not wait for torch.
    from secateur.report import write_report

    if len(directories) > 1:
        raise RecipeError(
            f"report: takes one DIR, got {len(directories)}; run it for each, and compare recipes with secateur "
            "compare, which measures all on the same text."
        )
    print(write_report(directories[0]))
