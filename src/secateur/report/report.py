"""What people read of a result: `report.html`, one page that needs no network, and the model card.

In: a result's directory, or the run's records. Out: HTML; Markdown below the hub's metadata, see
https://huggingface.co/docs/hub/model-cards. No local path is in the card. Of a `Measurement`: its
table, and a page with the curve of what sizes cost.
"""

import re
import shlex
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import linear_regression

from huggingface_hub import ModelCardData

from secateur.data.blocks import NGRAM_TOKENS
from secateur.facts import OTHER_TEXT, OWN_ANSWERS
from secateur.files import without_places, write_text
from secateur.log import human_bytes
from secateur.recipe import RECIPE_FILE, Domain, Recipe, as_recipe, dump_recipe
from secateur.report.page import (
    Chart,
    Page,
    Section,
    Table,
    Tables,
    code,
    escaped,
    markdown,
    render,
    terminal,
)
from secateur.report.records import (
    GroupStep,
    Measurement,
    RecoveryRecord,
    RemovedLayer,
    ResultFiles,
    SizeCost,
    Summary,
    mean_change,
    nats_at,
    read_result,
    read_summary,
)
from secateur.report.rows import (
    SIDES,
    bench_tables,
    beside_verdict,
    caveats,
    figure_rows,
    figure_tables,
    headline,
    judged_table,
    loss_changes,
    note_rows,
    of_dense,
    quality_and_size,
    quality_rows,
    recovery_card,
    verdict,
    verdict_table,
    who_suffers,
)
from secateur.result_directory import PAGE_FILE, RESULT_FILE, write_summary

CARD_FILE = "README.md"
TAGS = ("secateur", "pruned", "structured-pruning")
NUM_WORST = 3  # domains named as those that suffered most
# Not huggingface_hub's ModelCard, which warns of a card without metadata and refuses one that is
# not YAML.
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)

# Marks on the curve: nats per token lost on the model's own answers, or on text of other sources
# without these.
TOO_FAR = "too far"
MARKS = {"hardly noticed": 0.05, "with a polish": 0.5, TOO_FAR: 1.0}
# Of the texts that judge, the first one of these that is there is what marks go by.
JUDGED_FIRST = (OWN_ANSWERS, OTHER_TEXT)
MEAN = "mean of domains"
# A picture ends at so many nats.
MOST_NATS = 2.5


def quality_section(files: ResultFiles) -> Section | None:
    """Loss by domain, before and after; what training won back; what `secateur evaluate`
    measured.
    """
    summary, changes = files.summary, loss_changes(files.summary)
    text, tables = list[str](), list[Table]()
    if changes:
        unit = f"nats per token{of_dense(summary)}"
        about = "one standard error over the same documents"
        if not any(change.standard_error for change in changes.values()):
            about = "unknown, as there is one document alone"
        text.append(f"In {unit}; lower is better. ± is {about}.")
        rises = [
            change.nats_per_token for change in (*changes.values(), mean_change(changes.values()))
        ]
        bars = [[max(0.0, rise) / max(*rises, 1e-9)] for rise in rises]
        caption = f"{unit.capitalize()} (perplexity); bars: the difference"
        rows = list(quality_rows(summary))
        # The domains and their mean, which have bars, are the last rows.
        tables.append(
            Table(caption, ("", *SIDES), rows, bars=[*([[]] * (len(rows) - len(bars))), *bars])
        )
    if summary.polish is not None:
        tables.append(
            verdict_table(summary.polish, "The polish, on the text that guards it", "polished")
        )
    if files.recovery is not None:
        text.append(
            f"{files.recovery.pruned}: {files.recovery.headline}. Figures elsewhere on this page "
            "are of the model before recovery, unless measured later."
        )
        tables.append(judged_table(files.recovery))
        tables.append(verdict_table(files.recovery, "The recovery, on the text that guards it"))
    if files.evaluation is not None:
        text += [f"By secateur evaluate: {note}" for note in files.evaluation.notes]
        tables += figure_tables(files.evaluation)
    shown = [table for table in tables if table.rows]
    return Section("quality", "Quality by domain", text, shown) if shown else None


def samples_section(files: ResultFiles) -> Section | None:
    """What both models answer to the same prompts."""
    answers = files.summary.own_answers
    tables = [
        Table(
            pair.prompt,
            (),
            [("dense", _printable(pair.dense)), ("pruned", _printable(pair.pruned))],
        )
        for pair in (answers.shown if answers else ())
    ]
    text = "Both models answer the same prompts, always by the likeliest token."
    return Section("samples", "Answers of both", (text,), tables) if tables else None


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text).strip("\n")


def speed_section(files: ResultFiles) -> Section:
    """Size, and if `secateur bench` has measured them, speed and memory beside the ideal."""
    bench = files.bench
    sizes = Table("Parameters, bytes, widths", ("", *SIDES), list(figure_rows(files.summary)))
    if bench is None or not bench.speed_ups:
        return Section("speed", "Size", tables=(sizes,))
    how = (
        f"secateur bench: transformers on {bench.device}, {bench.workload.repeats} repeats in "
        "turns. Ideal: operations per prompt token and bytes read per decoded token, dense over "
        "pruned."
    )
    return Section("speed", "Speed and memory", (how, *bench.notes), (*bench_tables(bench), sizes))


def removed_section(files: ResultFiles) -> Section | None:
    """Which layers, units of every layer, and tokens went."""
    text, tables = list[str](), list[Table]()
    if files.removed_layers:
        before, after = files.summary.num_layers
        text.append(
            f"{before} layers → {after}; their table numbers layers as the dense model did."
        )
        tables.append(_layer_table(files.removed_layers))
    if files.steps:
        groups = _counts(files.steps)
        sums = {
            group: [sum(column) for column in zip(*units.values(), strict=True)]
            for group, units in groups.items()
        }
        shares = ", ".join(
            f"{kept / before:.1%} of {name}" for name, (before, kept) in sums.items()
        )
        text.append(f"Kept: {shares} units.")
        rows, bars = list[tuple[str, ...]](), list[list[float]]()
        # Layers may have different groups: experts in some, an MLP in others.
        for layer in sorted({layer for units in groups.values() for layer in units}):
            counts = [units.get(layer) for units in groups.values()]
            cells = ["{:,} → {:,}".format(*pair) if pair else "" for pair in counts]
            rows.append((f"layer {layer}", *cells))
            bars.append([kept / before for before, kept in filter(None, counts)])
        caption = "Units by layer, before → kept; bars: the share that stays"
        tables.append(Table(caption, ("", *groups), rows, bars=bars))
    if (vocabulary := files.summary.vocabulary) is not None:
        text.append(who_suffers(vocabulary))
    return Section("removed", "What went where", text, tables) if text else None


def _layer_table(layers: Sequence[RemovedLayer]) -> Table:
    """Return the removed layers in the order chosen."""
    rows = []
    for layer in sorted(layers, key=lambda layer: layer.chosen or layer.layer):
        errors = [100 * error for error in (layer.error_after or {}).values()]
        left = f"{sum(errors) / len(errors):.1f}%" if errors else "not patched"
        choice = ("named", "") if layer.kl is None else (str(layer.chosen), f"{layer.kl:.4f}")
        rows.append((f"layer {layer.layer}", *choice, left))
    return Table("Removed layers", ("", "chosen", "KL without it", "missing after the patch"), rows)


def _counts(steps: Sequence[GroupStep]) -> dict[str, dict[int, tuple[int, int]]]:
    """Return units before the first round and kept by the last, by group and layer."""
    before = {(step.group, step.layer): step.total for step in steps if step.round == 1}
    last = max(step.round for step in steps)
    groups: dict[str, dict[int, tuple[int, int]]] = {}
    for step in sorted((step for step in steps if step.round == last), key=lambda step: step.layer):
        groups.setdefault(step.group, {})[step.layer] = (before[step.group, step.layer], step.kept)
    return groups


def text_section(files: ResultFiles) -> Section:
    """Which text, how much, and whether calibration saw held-out text."""
    text, domains = files.summary.calibration, files.recipe.calibration.domains
    about = (
        f"{sum(text.num_tokens.values()):,} tokens to measure on, "
        f"{sum(text.num_held_out_tokens.values()):,} that guard the run and "
        f"{sum(text.num_judged_tokens.values()):,} that judge it, in blocks of "
        f"{text.sequence_length}. A text too short for both judges by what guards. Overlap: the "
        f"share of the judging text's {NGRAM_TOKENS}-grams of tokens that the calibration text has "
        "too; boilerplate counts.",
        f"SHA-256 of all token blocks: {text.content_hash}",
    )
    rows = []
    for name, num in text.num_tokens.items():
        counts = (num, text.num_held_out_tokens[name], text.num_judged_tokens[name])
        share = text.held_out_overlap[name]
        overlap = "blocks too short" if share is None else f"{share:.2%}"
        rows.append(
            (name, *(f"{count:,}" for count in counts), overlap, source_text(domains[name]))
        )
    header = ("domain", "tokens", "guard", "judge", "overlap", "source")
    return Section("text", "Text", about, (Table("Text by domain", header, rows),))


def repeat_section(files: ResultFiles) -> Section:
    """The commands and the recipe that make the result again, and what the run was made with."""
    summary = files.summary
    how = "--recipe recipe.yaml"
    if summary.like is not None:
        how = f"--like {shlex.quote(summary.like.name)}"
    if summary.measured is not None:
        how = f"--from {shlex.quote(summary.measured)} {how}"
    lines = [
        f"pip install secateur=={summary.versions['secateur']} "
        f"torch=={summary.versions['torch'].split('+')[0]}",
        f"pip install transformers=={summary.versions['transformers']}",
        f"secateur prune {shlex.quote(summary.model)} OUT {how}",
    ]
    if files.recovery is not None:  # whose settings a prune refuses
        lines += [files.recovery.command or "# then, from Python, secateur.recover"]
    recipe = files.recipe.model_copy(update={"recover": None})
    lines += ["", "# recipe.yaml, every default filled in"]
    lines += [dump_recipe(recipe, places=False).strip()]
    about = (
        f"This run: {summary.command or 'secateur.prune, from Python'}",
        "On the same machine with the same versions the weights come out the same to the byte; the "
        "calibration hash tells whether the text is the same.",
    )
    rows = [*note_rows(summary), *summary.versions.items()]
    table = Table("Cost, proof of reload, versions", (), rows, folded=True)
    return Section("repeat", "How to repeat it", about, tables=(table,), code="\n".join(lines))


# Each returns None where the run has nothing of what it is about.
SECTIONS: tuple[Callable[[ResultFiles], Section | None], ...] = (
    samples_section,
    quality_section,
    speed_section,
    removed_section,
    text_section,
    repeat_section,
)


def card_data(summary: Summary, recipe: Recipe) -> ModelCardData:
    """Return the hub's metadata. What is not known is None, which is left out; `unknown` says
    why.
    """
    dense = summary.lineage[-1]
    base_model = next(
        (checkpoint.hub_id for checkpoint in reversed(summary.lineage) if checkpoint.hub_id), None
    )
    datasets = {
        without_places(domain.dataset)
        for domain in recipe.calibration.domains.values()
        if domain.dataset
    }
    return ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,  # the hub knows no `pruned`
        datasets=sorted(datasets) or None,
        language=None if summary.vocabulary else list(dense.languages) or None,
        library_name="transformers",
        license=dense.license,
        license_name=dense.license_name,
        license_link=dense.license_link,
        pipeline_tag="image-text-to-text"
        if summary.loaded_by == "AutoModelForImageTextToText"
        else "text-generation",
        tags=list(TAGS),
    )


def unknown(data: ModelCardData, summary: Summary) -> Iterator[str]:
    """Yield a sentence about each part of the metadata that is not known."""
    if data.license is None:
        yield (
            "the licence of the dense model is not known, so the card names none; add license to "
            "its first lines."
        )
    if data.base_model is None:
        yield (
            "the hub id of the dense model is not known, so the card names none; add base_model to "
            "its first lines."
        )
    if data.language is None and summary.vocabulary is not None:
        yield (
            "the vocabulary was trimmed, so the card does not repeat the languages of the dense "
            "model."
        )


def with_metadata(card: str, data: ModelCardData) -> str:
    """Return the card with this metadata in place of its own, if it has any."""
    return f"---\n{data.to_yaml()}\n---\n{_FRONT_MATTER.sub('', card, count=1)}"


def model_card(summary: Summary, recipe: Recipe) -> str:
    """Return the card: what was removed, measured, how to load it, what it is bad at, how it was
    made.
    """
    trimmed = [] if summary.vocabulary is None else [escaped(who_suffers(summary.vocabulary)), ""]
    lines = [
        "",
        f"# {escaped(summary.model)}, pruned by secateur",
        "",
        *trimmed,
        f"**{escaped(verdict(summary))}.**",
        "",
        escaped(beside_verdict(summary)),
        "",
        *_loading(summary),
        "",
        *markdown(quality_and_size(summary)),
        "",
        *_calibrated_on(summary, recipe),
        "",
        "## How it was made",
        "",
        f"- command: {code(summary.command)}"
        if summary.command
        else "- from Python: `secateur.prune`",
        *(f"- {label}: {escaped(text)}" for label, text in note_rows(summary)),
        f"- versions: {escaped(', '.join(map(' '.join, summary.versions.items())))}",
        "- all options: `recipe.yaml`; kept units: `keep.json`; every step: `run.jsonl`; all "
        "figures: `result.json`",
        *(f"- note: {escaped(note)}" for note in caveats(summary)),
    ]
    return with_metadata("\n".join(lines) + "\n", card_data(summary, recipe))


def _calibrated_on(summary: Summary, recipe: Recipe) -> Iterator[str]:
    """Yield which text the run saw, and the domains that lost most, against the dense model."""
    yield from ("## What it was calibrated on, and what it is bad at", "")
    for name, num_tokens in summary.calibration.num_tokens.items():
        source = source_text(recipe.calibration.domains[name])
        yield f"- {escaped(f'{name}: {num_tokens:,} tokens ({source})')}"
    ratios = [
        (summary.pruned_losses[name].perplexity / dense.perplexity, name)
        for name, dense in summary.dense_losses.items()
    ]
    worst = ", ".join(
        f"{name} ({ratio:.2f} times the dense model's perplexity)"
        for ratio, name in sorted(ratios, reverse=True)[:NUM_WORST]
        if ratio > 1
    )
    other = (
        "Text of other kinds, and other languages, were not measured, and can have lost much more."
    )
    none = "No measured domain lost." if ratios else "Losses were not measured."
    suffers = f"It lost most on {worst}." if worst else none
    yield from ("", escaped(f"{suffers} {other}"))


def source_text(domain: Domain) -> str:
    """Return where a domain's text comes from, files by their names alone."""
    key, value = domain.source
    public = without_places(value, key)
    known = {"installed": "text of installed Python packages", "answers": "questions of its own"}
    source = ", ".join(public) if key == "files" else known.get(key) or f"{key} {public}"
    return f"answers of the dense model to {source}" if domain.answers else source


def _loading(summary: Summary) -> list[str]:
    how, first, trust, config = "Loads with stock transformers:", [], "", ""
    if summary.has_layers_of_different_widths:
        how = (
            "Its layers have widths of their own, which stock modelling cannot build. Load it with "
            "secateur, or let transformers run the modelling file beside the weights:"
        )
        first = ["import secateur", "", 'model = secateur.load("path/to/this/directory")', ""]
        trust, config = ", trust_remote_code=True", ", config=model.config"
    return [
        f"{escaped(headline(summary))}. {how}",
        "",
        "```python",
        *first,
        f"from transformers import {summary.loaded_by}, AutoTokenizer",
        "",
        f'model = {summary.loaded_by}.from_pretrained("path/to/this/directory"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory"{config})',
        "```",
    ]


def recovered_card(card: str | None, record: RecoveryRecord) -> str:
    """Return the pruned model's card, or a new one, with a section on the recovery before how it
    was made.
    """
    text = f"# {escaped(record.pruned)}, recovered by secateur\n" if card is None else card
    before, heading, after = text.partition("\n## How it was made\n")
    return f"{before.rstrip()}\n\n{recovery_card(record)}{heading}{after}"


def write_pages(directory: Path, summary: Summary, recipe: Recipe) -> Summary:
    """Write card, `result.json` and page of a finished run; return the summary as it was
    written.
    """
    (directory / CARD_FILE).write_text(model_card(summary, recipe), encoding="utf-8")
    return _complete(directory, summary)


def write_recovered_pages(directory: Path, record: RecoveryRecord) -> None:
    """Add a recovery to the card of the directory, if it has one; write digests and page if it is a
    result.
    """
    path, is_result = directory / CARD_FILE, (directory / RESULT_FILE).is_file()
    text = recovered_card(path.read_text(encoding="utf-8") if path.is_file() else None, record)
    if is_result:
        text = with_metadata(
            text, card_data(read_summary(directory), as_recipe(directory / RECIPE_FILE))
        )
    path.write_text(text, encoding="utf-8")
    if is_result:
        _complete(directory, read_summary(directory))


def _complete(directory: Path, summary: Summary) -> Summary:
    """Write `result.json` with all digests, and the page; return the summary."""
    summary = write_summary(directory, summary)
    write_page(directory)
    return summary


def add_figures(directory: Path, name: str, figures: str) -> None:
    """Write what was measured of a model into a directory, and the page anew if that is a
    result.
    """
    write_text(directory / name, figures)
    if (directory / RESULT_FILE).is_file():
        write_page(directory)


def write_page(directory: Path) -> None:
    """Write `report.html` into a result directory. Raises CheckpointError for files that cannot be
    read or written.
    """
    write_text(directory / PAGE_FILE, render(report_page(read_result(directory))))


def report_page(files: ResultFiles) -> Page:
    """Return the report of one run."""
    summary = files.summary
    shown = [section for make in SECTIONS if (section := make(files)) is not None]
    ups = {phase: up.measured for phase, up in files.bench.speed_ups.items()} if files.bench else {}
    tasks = files.evaluation is not None and files.evaluation.pruned.tasks is not None
    beside = beside_verdict(summary, ups, asked_tasks=tasks)
    title = f"{summary.model}, pruned by secateur"
    return Page(title, f"{verdict(summary)}.", [*caveats(summary)], shown, beside)


def write_measurement(directory: Path, measurement: Measurement) -> Measurement:
    """Write the page and `result.json`; return the measurement with the digests of its files."""
    (directory / PAGE_FILE).write_text(render(measurement_page(measurement)), encoding="utf-8")
    return write_summary(directory, measurement)


def measurement_table(measurement: Measurement) -> Tables:
    """Return what the terminal shows: a table, and the marks."""
    return terminal(
        [_sizes_table(measurement)], _measurement_notes(measurement), warnings=measurement.warnings
    )


def measurement_page(measurement: Measurement) -> Page:
    """Return the page: the picture first, then the tables, and what was cut to foretell from."""
    lines = {
        name: [(cost.removed, _lost(cost)[name]) for cost in measurement.sizes]
        for name in (*JUDGED_FIRST, MEAN)
        if name in _lost(measurement.sizes[0])
    }
    chart = Chart(
        "Nats per token lost, by the share of all parameters that goes",
        lines,
        marked(measurement),
        MOST_NATS,
    )
    probes = _costs_table(measurement, "Cut and judged", measurement.probes)
    sections = [
        Section(
            "curve",
            "How much can go",
            [f"{name}: {text}" for name, text in _measurement_notes(measurement)],
            chart=chart,
        ),
        Section("sizes", "Size by size", tables=[_sizes_table(measurement)]),
        Section("probes", "What this rests on", tables=[probes], code=measurement.command),
    ]
    title = f"{measurement.model}: what smaller costs, by secateur"
    verdict = ", ".join(
        f"{name} {bound}" for name, bound in _bounds(measurement).items()
    ).capitalize()
    return Page(title, f"{verdict}.", measurement.warnings, sections)


def marked(measurement: Measurement) -> dict[str, float]:
    """Return the largest share at which each mark is kept, in thousandths; no size may be too
    far.
    """
    first = next(iter(_lost(measurement.sizes[0])))
    shares = range(1, int(1000 * measurement.sizes[-1].removed) + 1)
    lost = [nats_at(measurement.probes, first, share / 1000, measurement.units) for share in shares]
    kept = {name: bisect_right(lost, nats) for name, nats in MARKS.items()}
    return {name: num / 1000 for name, num in kept.items() if name != TOO_FAR or num < len(lost)}


def _bounds(measurement: Measurement) -> dict[str, str]:
    shares = marked(measurement).items()
    return {name: f"{'from' if name == TOO_FAR else 'up to'} {share:.1%}" for name, share in shares}


def _lost(cost: SizeCost) -> dict[str, float]:
    """Return nats lost by what judged: first the model's own answers, if it gives any, and other
    text, then the domains, then their mean.
    """
    first = {name: cost.lost[name] for name in JUDGED_FIRST if name in cost.lost}
    domains = {name: nats for name, nats in cost.lost.items() if name not in first}
    return {**first, **domains, MEAN: sum(domains.values()) / len(domains)}


def _sizes_table(measurement: Measurement) -> Table:
    # Every second one is shown.
    return _costs_table(
        measurement,
        f"{measurement.model}: nats per token lost",
        measurement.sizes[1::2] or measurement.sizes,
    )


def _costs_table(measurement: Measurement, caption: str, shown: Sequence[SizeCost]) -> Table:
    lost = [_lost(cost) for cost in shown]
    rows = [[name, *(f"{of_size[name]:.3f}" for of_size in lost)] for name in lost[0]]
    rows.append(["parameters", *(f"{cost.num_params / 1e6:,.1f} M" for cost in shown)])
    # A token takes the less time the fewer weights it passes.
    probed = [probe.removed for probe in measurement.probes]
    for name, seconds in zip(("read", "written"), zip(*measurement.pace, strict=True), strict=True):
        line = linear_regression(probed, seconds)
        rates = (1 / (line.intercept + line.slope * cost.removed) for cost in shown)
        rows.append([f"tokens/s {name}", *(f"{rate:,.1f}" for rate in rates)])
    rows += [
        [kind, *(human_bytes(cost.num_bytes[kind]) for cost in shown)]
        for kind in shown[0].num_bytes
    ]
    return Table(caption, ("goes", *(f"{cost.removed:.1%}" for cost in shown)), rows)


def _measurement_notes(measurement: Measurement) -> list[tuple[str, str]]:
    first = next(iter(_lost(measurement.sizes[0])))
    bounds = _bounds(measurement).items()
    probes = ", ".join(f"{probe.removed:.1%}" for probe in measurement.probes)
    note = (
        f"without a polish, from models cut to {probes} and judged; the middle one is "
        f"{measurement.band:.0%} off"
    )
    return [
        *((name, f"{bound}, {MARKS[name]:g} nats per token on {first}") for name, bound in bounds),
        ("foretold", f"{note}, as a mean over texts, where the others foretell it"),
        (
            "tokens/s",
            "of one prompt, here: a line through the seconds per token of these models, timed by "
            "turns",
        ),
    ]
