"""The commands that measure: `evaluate`, `bench` and `compare`."""

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
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Let tasks run the code that a model writes, without a network.")
    ] = False,
    tasks_data: common.TasksData = None,
    device: common.Device = None,
    other_dense: common.OtherDense = False,
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
    with common.listeners(quiet=quiet, as_json=as_json) as listeners:
        text: dict[str, Any] = {"domains": domains, "num_blocks": num_blocks, "sequence_length": sequence_length}
        text |= {"wikitext2": wikitext2, "wikitext2_length": wikitext2_length}
        asked: dict[str, Any] = {"tasks": names, "limit": limit, "num_fewshot": num_fewshot}
        asked |= {"batch_size": batch_size, "run_code": run_code, "tasks_data": tasks_data}
        asked |= {"device": device, "other_dense": other_dense, "out": out}
        result = secateur.evaluate(model, against, **text, **asked, **listeners)
    common.show(result, f"{(out or Path(model)) / 'evaluation.json'}", as_json=as_json)


@common.app.command(epilog="Example: secateur bench smaller --against Qwen/Qwen2.5-0.5B --prompt-tokens 512")
def bench(
    model: common.Model,
    against: Annotated[str | None, typer.Option(metavar="DENSE", help="The model that MODEL was pruned from.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate after each.")] = 32,
    repeats: Annotated[int, typer.Option(help="Runs of each model, in turns.")] = 5,
    device: common.Device = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    other_dense: common.OtherDense = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Time MODEL, in turns with DENSE, and compare the speed-up with the ideal for its size."""
    from secateur.model.identity import is_result
    from secateur.result_directory import BENCH_FILE

    workload = {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
    }
    with common.progress_bar(enabled=not (quiet or as_json)) as progress:
        options: dict[str, Any] = {"device": device, "compiled": compiled, "progress": progress}
        options |= {"other_dense": other_dense}
        result = secateur.bench(model, against, **workload, **options)
    common.show(result, f"{Path(model, BENCH_FILE)}" if is_result(Path(model)) else "", as_json=as_json)


@common.app.command(epilog="Example: secateur compare paper out --small --model smollm2-135m")
def compare(
    study: Annotated[
        str, typer.Argument(help="A study's YAML file, or a shipped one: methods, paper, tokens, vocabulary.")
    ],
    out: Annotated[Path, typer.Argument(help="The directory for cells and tables; finished cells stay.")],
    model: Annotated[str | None, typer.Option(help="Replaces the study's model.")] = None,
    small: Annotated[bool, typer.Option("--small", help="The study's short form.")] = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Run a grid of methods, shares and seeds; after an interruption it continues."""
    with common.listeners(quiet=quiet, as_json=as_json) as listeners:
        comparison = secateur.compare(study, out, model=model, small=small, **listeners)
    common.show(comparison, f"{out}: table.md, results.json", as_json=as_json)
