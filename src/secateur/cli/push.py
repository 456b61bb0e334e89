"""The command `push`."""

from pathlib import Path
from typing import Annotated

import typer

import secateur
import secateur.cli.common as common


@common.app.command(epilog="Example: secateur push smaller me/Qwen2.5-0.5B-pruned --dry-run")
def push(
    result: Annotated[Path, typer.Argument(help="A directory that prune or recover has written.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The model's name on the Hugging Face hub.")],
    base_model: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="The dense model's hub id, if it is not known.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it; by default only its owner.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be sent; no network.")] = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Upload RESULT with its model card to the hub: what secateur wrote, without local paths."""
    import yaml

    from secateur.log import human_bytes
    from secateur.report.page import Table
    from secateur.report.rows import terminal

    with common.progress_bar(enabled=not (quiet or as_json or dry_run)) as progress:
        options = {"base_model": base_model, "public": public, "dry_run": dry_run}
        found = secateur.push(result, repo, **options, progress=progress)
    if as_json:
        print(found.to_json(), end="")
        return
    rows = [(name, human_bytes(size)) for name, size in found.files.items()]
    rows.append(("together", human_bytes(sum(found.files.values()))))
    common.CONSOLE.print(terminal([Table("", ("file", "size"), rows)]))
    text = yaml.safe_dump({"model card": found.metadata}, sort_keys=False, allow_unicode=True, width=100)
    common.CONSOLE.print(text, end="", soft_wrap=True)
    for note in found.notes:
        common.CONSOLE.print(f"note: {note}", soft_wrap=True)
    seen = "private" if found.private else "public"
    done = f"Would go to {repo}, {seen}; nothing was sent" if found.url is None else f"Pushed to {found.url}, {seen}"
    common.CONSOLE.print(f"{done}.", soft_wrap=True)
