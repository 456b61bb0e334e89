"""The command `compare`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from secateur.cli.app import CONSOLE, Json, Quiet, app, tell
from secateur.progress_bar import progress_bar


@app.command(epilog="Example: secateur compare paper out --small --model smollm2-135m")
def compare(
    study: Annotated[str, typer.Argument(help="A study's YAML file, or a shipped one: paper, methods, tokens.")],
    out: Annotated[Path, typer.Argument(help="The directory for cells, table and page; finished cells are kept.")],
    model: Annotated[str | None, typer.Option(help="The model instead of the study's own.")] = None,
    small: Annotated[bool, typer.Option("--small", help="The study's short form.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a grid of methods, ratios and seeds; an interrupted one goes on where it stopped."""
    from secateur.compare import compare as run_study
    from secateur.compare_page import rows_of, verdict
    from secateur.ranks import is_first
    from secateur.study import load_study

    parsed = load_study(study, small=small, model=model)
    with progress_bar(enabled=is_first() and not (quiet or as_json)) as progress:
        found = run_study(parsed, out, progress, tell)
    if not is_first():
        return
    if as_json:
        print(json.dumps([dataclasses.asdict(cell) for cell in found], indent=2))
        return
    table = Table(title=parsed.question, title_justify="left", title_style="bold")
    for column in ("method", "asked", "removed", "perplexity, mean of seeds", "seeds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows_of(found):
        perplexity = sum(cell.perplexity for cell in row.cells) / len(row.cells)
        reached = sum(cell.remove_reached for cell in row.cells) / len(row.cells)
        cells = (f"{row.ratio:.0%}", f"{reached:.1%}", f"{perplexity:.2f}", str(len(row.cells)))
        table.add_row(row.method, *cells)
    CONSOLE.print(table)
    CONSOLE.print(verdict(found))
    CONSOLE.print(f"Written to {out}: report.html, table.md, results.json.", soft_wrap=True)
