"""The command `compare`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

import secateur
import secateur.cli.common as common


@common.app.command(epilog="Example: secateur compare paper out --small --model smollm2-135m")
def compare(
    study: Annotated[str, typer.Argument(help="A study's YAML file, or a shipped one: paper, methods, tokens.")],
    out: Annotated[Path, typer.Argument(help="The directory for cells, table and page; finished cells stay.")],
    model: Annotated[str | None, typer.Option(help="Replaces the study's model.")] = None,
    small: Annotated[bool, typer.Option("--small", help="The study's short form.")] = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Run a grid of methods, shares and seeds; after an interruption it continues."""
    from secateur.evaluation.study import load_study, overview, verdict
    from secateur.ranks import is_first
    from secateur.report.rows import terminal

    parsed = load_study(study, small=small, model=model)
    with common.progress_bar(enabled=is_first() and not (quiet or as_json)) as progress:
        found = list(secateur.compare(parsed, out, progress=progress, tell=common.tell).cells)
    if not is_first():
        return
    if as_json:
        print(json.dumps([dataclasses.asdict(cell) for cell in found], indent=2))
        return
    common.CONSOLE.print(terminal([overview(parsed.question, found)]))
    common.CONSOLE.print(verdict(found))
    common.CONSOLE.print(f"Written to {out}: report.html, table.md, results.json.", soft_wrap=True)
