"""The command `evaluate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

import secateur
import secateur.cli.common as common
from secateur.recipe_file import parse_recipe

Wikitext = Annotated[
    str | None, typer.Option(help="Also WikiText-2 perplexity: a file with the rows of the raw test split, or `hub`.")
]


@common.app.command(
    epilog="Example: secateur evaluate smaller --against Qwen/Qwen2.5-0.5B --tasks arc_easy,hellaswag --limit 500"
)
def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A result of prune, or any other model.")],
    against: Annotated[str | None, typer.Option(help="The dense model: differences, and KL per domain.")] = None,
    domain: common.Domains = None,
    num_blocks: Annotated[int, typer.Option(min=1, help="Blocks per --domain.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens per block of --domain.")] = 512,
    wikitext2: Wikitext = None,
    wikitext2_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per block there; default 2048, or the model's longest if less.")
    ] = None,
    tasks: common.Tasks = None,
    limit: common.Limit = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in each prompt of the tasks.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions of a task at a time.")] = 1,
    tasks_data: common.TasksData = None,
    device: common.Device = None,
    out: Annotated[Path | None, typer.Option(help="Where evaluation.json goes, if not into DIR.")] = None,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Measure DIR on its recipe's held-out text (or --domain) and on tasks; resumes by itself."""
    domains = None
    if domain:
        asked = {"calibration": {"domains": common.parse_domains(domain)}}
        domains = parse_recipe(asked, "--domain").calibration.domains
    names = common.task_names(tasks, tasks_data)

    # Imported here so that --help and option errors do not wait for torch.
    from secateur.ranks import is_first
    from secateur.report.rows_measured import evaluation_table

    with common.progress_bar(enabled=is_first() and not (quiet or as_json)) as progress:
        text: dict[str, Any] = {"domains": domains, "num_blocks": num_blocks, "sequence_length": sequence_length}
        text |= {"wikitext2": wikitext2, "wikitext2_length": wikitext2_length}
        asked: dict[str, Any] = {"tasks": names, "limit": limit, "num_fewshot": num_fewshot}
        asked |= {"batch_size": batch_size, "tasks_data": tasks_data}
        result = secateur.evaluate(
            model, against, **text, **asked, device=device, out=out, progress=progress, tell=common.tell
        )
    if not is_first():
        return
    if as_json:
        print(result.to_json(), end="")
        return
    common.CONSOLE.print(evaluation_table(result))
    common.CONSOLE.print(f"Written to {(out or Path(model)) / 'evaluation.json'}.", soft_wrap=True)
