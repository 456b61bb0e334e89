"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.app import app
from secateur.errors import RecipeError


@app.command(epilog="Example: secateur report pruned-10 pruned-20 pruned-30 --out comparison.html")
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Results of secateur prune.")],
    out: Annotated[
        Path | None, typer.Option(help="With several DIR: where to write the page that compares them (./report.html).")
    ] = None,
) -> None:
    """Write report.html into each DIR anew from its files, and, of several, one page side by side."""
    # Imported here so that --help and option errors do not wait for torch.
    from secateur.report import write_reports

    if out is not None and len(directories) == 1:
        raise RecipeError(f"--out {out}: is for the page that compares several DIR, got one; leave it out.")
    for path in write_reports(directories, out or Path("report.html")):
        print(path)
