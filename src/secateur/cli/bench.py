"""The command `bench`."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.app import CONSOLE, Json, Model, Quiet, app
from secateur.progress_bar import progress_bar

FILE_NAME = "bench.json"


@app.command(epilog="Example: secateur bench smaller --against Qwen/Qwen2.5-0.5B --prompt-tokens 512")
def bench(
    model: Model,
    against: Annotated[str | None, typer.Option(metavar="DENSE", help="The model that it was pruned from.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens written after each.")] = 32,
    repeats: Annotated[int, typer.Option(help="Runs of each model, taking turns.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = False,
    engine: Annotated[
        str, typer.Option(help="transformers, or llama.cpp (exports both as GGUF first).")
    ] = "transformers",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time MODEL, in turns with DENSE, and hold the speed-up to what its size allows at best."""
    from secateur.bench_tables import bench_table
    from secateur.benchmark import Settings, benchmark
    from secateur.ideal import Workload
    from secateur.staged_file import staged_file

    workload, settings = Workload(batch, prompt_tokens, new_tokens, repeats), Settings(engine, device, compiled)
    with progress_bar(enabled=not (quiet or as_json)) as progress:
        result = benchmark(model, against, workload=workload, settings=settings, progress=progress)
    if as_json:
        print(result.to_json(), end="")
    else:
        CONSOLE.print(bench_table(result))
    if not Path(model).is_dir():  # a hub id, whose cache is not ours to write in
        return
    with staged_file(Path(model, FILE_NAME), overwrite=True) as staged:
        staged.write_text(result.to_json(), encoding="utf-8")
    if not as_json:
        CONSOLE.print(f"Written to {Path(model, FILE_NAME)}.")
