"""The command line's application and the option types that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Make large language models smaller: whole channels out, ordinary Hugging Face checkpoints back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="A local directory, a hub id, a .gguf file, or smollm2-135m.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is an earlier result.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A YAML recipe; the options here override it.")]
Remove = Annotated[float | None, typer.Option(help="Share of total parameters to remove, tied weights counted once.")]
