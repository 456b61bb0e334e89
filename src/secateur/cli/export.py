"""The command `export`."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.app import CONSOLE, Json, Model, Quiet, app
from secateur.progress_bar import progress_bar


@app.command(epilog="Example: secateur export smaller --gguf smaller.gguf --type q8_0")
def export(
    model: Model,
    gguf: Annotated[Path, typer.Option(metavar="FILE", help="The GGUF file to write, for llama.cpp.")],
    type_name: Annotated[
        str | None, typer.Option("--type", help="f32, f16, bf16 or q8_0; by default the weights' own type.")
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Keep the file only if llama.cpp gives transformers' tokens and perplexity; "
            "by default where llama-cpp-python is installed.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write MODEL, its tokenizer and chat template as a GGUF file."""
    from secateur.export import export as export_model
    from secateur.tables import human_bytes

    with progress_bar(enabled=not (quiet or as_json)) as progress:
        done = export_model(model, gguf, type_name=type_name, check=check, overwrite=overwrite, progress=progress)
    if as_json:
        print(done.to_json(), end="")
        return
    CONSOLE.print(
        f"Written to {gguf}: {done.type_name}, {human_bytes(done.num_bytes)}, context {done.context_length:,}."
    )
    if done.check is None:
        why = "as asked" if check is False else 'llama-cpp-python is not installed; pip install "secateur[llama-cpp]"'
        CONSOLE.print(f"Not checked against llama.cpp: {why}.")
        return
    found = done.check
    CONSOLE.print(
        f"Checked: perplexity of {found.num_tokens} held-out tokens {found.perplexity_llama_cpp:.3f} in llama.cpp, "
        f"{found.perplexity_transformers:.3f} in transformers; {found.num_greedy_equal} of {found.num_greedy} greedy "
        f"tokens equal (largest gap {found.largest_gap_nats:.3f} nats)."
    )
