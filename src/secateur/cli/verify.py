"""The command `verify`."""

from pathlib import Path
from typing import Annotated

import typer

import secateur
import secateur.cli.common as common


@common.app.command(epilog="Example: secateur verify smaller")
def verify(
    result: Annotated[Path, typer.Argument(help="A directory that prune or recover has written.")],
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Check that RESULT is as it was written, by the sha256 of its files, and that it reloads.

    Status 0 if all is well, 1 if something does not match.
    """
    from secateur.report.rows import human_bytes, terminal

    with common.progress_bar(enabled=not (quiet or as_json)) as progress:
        found = secateur.verify(result, progress=progress)
    if as_json:
        print(found.to_json(), end="")
    else:
        rows = [("sha256", f"{found.num_files} files match, {human_bytes(found.num_bytes)}")]
        if found.max_abs_difference is not None:
            difference = f"largest logit difference {found.max_abs_difference:g}"
            rows.append(("reload", f"stock transformers in a fresh process: {difference}"))
        common.CONSOLE.print(terminal([], rows))
        for each in found.mismatches:
            text = f"{each.what}: expected {each.expected}, found {each.found.removesuffix('.')}."
            common.CONSOLE.print(text, soft_wrap=True)
    if found.mismatches:
        raise typer.Exit(1)
