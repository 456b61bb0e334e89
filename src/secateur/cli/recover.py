"""The command `recover`."""

from pathlib import Path
from typing import Annotated, Any

import typer

import secateur
import secateur.cli.common as common
from secateur.errors import RecipeError
from secateur.recipe_file import load_recipe, merged, over_preset, parse_recipe


@common.app.command(
    epilog="Example: secateur recover smaller --teacher Qwen/Qwen2.5-0.5B --tokens 1000000 --out recovered"
)
def recover(
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="A result of prune.")],
    teacher: Annotated[str, typer.Option(metavar="DENSE", help="The dense model that PRUNED came from.")],
    out: Annotated[Path | None, typer.Option(help="The directory to write; it appears complete or not at all.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to train on, all domains together.")] = None,
    recipe: common.RecipeFile = None,
    domain: common.Domains = None,
    answers: common.Answers = None,
    sets: common.Sets = None,
    tasks: common.Tasks = None,
    limit: common.Limit = None,
    tasks_data: common.TasksData = None,
    other_dense: common.OtherDense = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only predict the cost.")] = False,
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Train PRUNED on its recipe's domains, to win back quality; resumes by itself."""
    asked = {"tasks": list(common.task_names(tasks, tasks_data)) or None, "limit": limit}
    changes = _changes(tokens, recipe, domain, asked, sets, answers)
    # Imported here so that --help and option errors do not wait for torch.
    from secateur.recovery.open import dry_run as predict
    from secateur.report.rows_measured import cost_table, recovery_table

    if out is None and not dry_run:
        raise RecipeError("--out: is missing; say where to write the recovered model.")
    with common.progress_bar(enabled=not (quiet or as_json)) as progress:
        if out is None or dry_run:
            found = predict(pruned, teacher, changes, progress, other_dense=other_dense)
            shown = cost_table(found)
        else:
            command = common.command_line(out)
            tell = common.teller(enabled=not (quiet or as_json))
            options: dict[str, Any] = {"command": command, "progress": progress, "tell": tell}
            options |= {"overwrite": overwrite, "other_dense": other_dense, "tasks_data": tasks_data}
            found = secateur.recover(pruned, teacher, changes, out=out, **options)
            if found is None:  # another rank writes and prints
                return
            shown = recovery_table(found)
    if as_json:
        print(found.to_json(), end="")
        return
    common.CONSOLE.print(shown)
    if not dry_run:
        common.CONSOLE.print(f"Written to {out}.", soft_wrap=True)


def _changes(
    tokens: int | None,
    file: Path | None,
    domains: list[str] | None,
    tasks: dict[str, Any],
    sets: list[str] | None,
    answers: str | None = None,
) -> dict[str, Any]:
    """Return what options and file change in the pruned model's recipe."""
    changes = {} if file is None else load_recipe(file)
    parse_recipe(changes, f"recipe {file}")
    if "preset" in changes:
        changes = over_preset(changes, f"recipe {file}")
    settings: dict[str, Any] = {} if tokens is None else {"num_tokens": tokens}
    settings["evaluation"] = {key: value for key, value in tasks.items() if value is not None}
    changes = merged(changes, {"recover": settings})
    if domains:
        changes["calibration"] = {**changes.get("calibration", {}), "domains": common.parse_domains(domains)}
    return common.with_sets(common.with_answers(changes, answers, domains), sets)
