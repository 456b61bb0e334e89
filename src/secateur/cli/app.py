"""The command line's application and the option types that several commands share."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from secateur.errors import RecipeError
from secateur.recipe import INSTALLED_DOMAINS

app = typer.Typer(
    help="Make large language models smaller: whole channels out, ordinary Hugging Face checkpoints back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Paths and generated text are shown as they are, whatever brackets and colons they hold.
CONSOLE = Console(markup=False, emoji=False, highlight=False)

Model = Annotated[str, typer.Argument(help="A local directory, a hub id, a .gguf file, or smollm2-135m.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is an earlier result.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from what an interrupted run has finished.")]
MemoryBudget = Annotated[
    str | None, typer.Option(help="Such as 6GB, beyond the interpreter: weights that do not fit stay on disk.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...; without it a GPU if torch finds one, else the CPU.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A YAML recipe; the options here override it.")]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Start from fast, default, best, paper, qwen2.5-7b or qwen2.5-32b; --recipe and options override it."
    ),
]
Remove = Annotated[float | None, typer.Option(help="Share of total parameters to remove, tied weights counted once.")]
Domains = Annotated[
    list[str] | None,
    typer.Option(
        "--domain",
        metavar="NAME[=FILE]",
        help=f"Domain of text, repeatable: one of {', '.join(INSTALLED_DOMAINS)}, or any name with a text file.",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(help="Also these tasks of lm-evaluation-harness, with commas between: arc_easy,piqa."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many questions per task.")]
TasksData = Annotated[
    Path | None,
    typer.Option(help="Take the tasks' rows from DIR/<hub id>/<config>, as datasets' save_to_disk writes them."),
]


def task_names(tasks: str | None, directory: Path | None) -> tuple[str, ...]:
    """Return the names that `--tasks` says. Raises RecipeError if `--tasks-data` is no directory."""
    if directory is not None and not directory.is_dir():
        raise RecipeError(f"--tasks-data {directory}: there is no such directory.")
    return tuple(name.strip() for name in tasks.split(",")) if tasks else ()


def tell(text: str) -> None:
    """Print a line that is no result."""
    print(text, file=sys.stderr)


def parse_domains(texts: list[str]) -> dict[str, dict[str, Any]]:
    """Return what `--domain` says as a recipe's `calibration.domains`."""
    found: dict[str, dict[str, Any]] = {}
    for name, source in map(_domain, texts):
        if name in found:
            raise RecipeError(f"--domain {name}: given twice; list several files of one domain in a recipe.")
        found[name] = source
    return found


def _domain(text: str) -> tuple[str, dict[str, Any]]:
    name, separator, file = text.partition("=")
    if separator and not (name and file):
        raise RecipeError(f"--domain {text}: give NAME=FILE, or one of {', '.join(INSTALLED_DOMAINS)}.")
    return name, {"files": [file]} if separator else {"installed": name}
