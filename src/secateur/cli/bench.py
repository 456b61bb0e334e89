"""The command `bench`."""

from pathlib import Path
from typing import Annotated, Any

import typer

import secateur
import secateur.cli.common as common


@common.app.command(epilog="Example: secateur bench smaller --against Qwen/Qwen2.5-0.5B --prompt-tokens 512")
def bench(
    model: common.Model,
    against: Annotated[str | None, typer.Option(metavar="DENSE", help="The model that MODEL was pruned from.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate after each.")] = 32,
    repeats: Annotated[int, typer.Option(help="Runs of each model, in turns.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    engine: Annotated[
        str, typer.Option(help="transformers, or llama.cpp (exports both as GGUF first).")
    ] = "transformers",
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Time MODEL, in turns with DENSE, and compare the speed-up with the ideal for its size."""
    from secateur.report.measured import BENCH_FILE
    from secateur.report.rows_measured import bench_table

    workload = {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
    }
    with common.progress_bar(enabled=not (quiet or as_json)) as progress:
        options: dict[str, Any] = {"device": device, "compiled": compiled, "engine": engine, "progress": progress}
        result = secateur.bench(model, against, **workload, **options)
    if as_json:
        print(result.to_json(), end="")
        return
    common.CONSOLE.print(bench_table(result))
    if Path(model).is_dir():
        common.CONSOLE.print(f"Written to {Path(model, BENCH_FILE)}.")
