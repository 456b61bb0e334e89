"""A report's sections on the run: what was cut, what that changed, the text, how to repeat it.

In: a `ResultFiles`. Out: sections with plots and tables. Pure functions.
"""

import math
import shlex
from collections.abc import Sequence

from secateur.facts import NGRAM_TOKENS
from secateur.recipe import Domain
from secateur.report.page import Section, Table
from secateur.report.plots import Series, Text, error_plot, line_plot, spread_plot, width_plot
from secateur.report.records import GroupStep, ResultFiles
from secateur.report.rows import note_rows, overlap_cell

SCORE_TEXT = (
    "Importance of every unit; higher is kept. Units are chosen within a layer, so layers need not be comparable."
)
ROUND_COLUMNS = ("parameters left", "held-out perplexity")
OBS_TEXT = (
    "The error that remains when one unit goes and the others are refitted, weighted over domains, before any is gone; "
    "OBS removes the cheapest batch by batch and scores the rest again after each."
)
EXPERTS_TEXT = (
    "For whole experts it is the share of the energy of the layer's experts, weighted over domains, before any is gone."
)
EXPERTS = "experts"  # the group of that name in every family that has it


def depth(files: ResultFiles) -> Section | None:
    """Removed layers, and what their patches gave back."""
    if not files.removed_layers:
        return None
    before, after = files.summary.num_layers
    rows = []
    for removed in sorted(files.removed_layers, key=lambda removed: removed.chosen or removed.layer):
        left = f"{_mean(_percent(removed.error_after)):.1f}%" if removed.error_after else "not patched"
        choice = () if removed.kl is None else (str(removed.chosen), f"{removed.kl:.4f}")
        rows.append((f"layer {removed.layer}", *choice, left))
    how = (
        "Each time the layer went whose absence changes predictions least. KL, in nats per token, is that of the model "
        "without it and those chosen before, before any patch, and with FFNs about as narrow as widths will make them, "
        "so most of it comes from the widths."
    )
    measured = any(removed.kl is not None for removed in files.removed_layers)
    text = (
        f"{before} layers → {after}. {how if measured else 'The recipe named those that went.'} Where it can, the "
        "layer before is refitted to give what is linear in it; the last column is what is then missing of what the "
        "layer added, on held-out text, as a share of its energy.",
        "This table numbers layers as the dense model did; everything else here, as the result does.",
    )
    header = ("", *(("chosen", "KL without it") if measured else ()), "missing after the patch")
    title = "Removed layers by choice" if measured else "Removed layers"
    return Section("depth", "Removed layers", text, tables=(Table(title, header, rows),))


def widths(files: ResultFiles) -> Section | None:
    """Units that every layer had and kept."""
    if not files.steps:
        return None
    groups = _counts(files.steps)
    sums = {group: [sum(column) for column in zip(*units.values(), strict=True)] for group, units in groups.items()}
    shares = ", ".join(f"{kept / before:.1%} of {group}" for group, (before, kept) in sums.items())
    described = Text("widths-plot", "Kept units by layer", f"A bar per layer; kept: {shares}.")
    # Layers may have different groups: experts in some, an MLP in others.
    rows = []
    for layer in sorted({layer for units in groups.values() for layer in units}):
        cells = ["{:,} → {:,}".format(*units[layer]) if layer in units else "" for units in groups.values()]
        rows.append((f"layer {layer}", *cells))
    table = Table("Units by layer, before → kept", ("", *groups), rows, folded=True)
    plots = (width_plot(described, groups),)
    return Section("widths", "Kept width by layer", (f"Kept: {shares} units.",), plots, (table,))


def scores(files: ResultFiles) -> Section | None:
    """Spread of the scores within each layer."""
    steps = [step for step in _last_round(files.steps) if step.score_quantiles]
    if not steps:
        return None
    by_group = _by_group(steps)
    spreads = {group: {step.layer: step.score_quantiles for step in of} for group, of in by_group.items()}
    is_obs = files.recipe.choose.score == "obs" and set(by_group) != {EXPERTS}
    text = [OBS_TEXT if is_obs else SCORE_TEXT, f"Score: {files.recipe.choose.score}."]
    if files.recipe.choose.score == "obs" and EXPERTS in by_group:
        text.insert(1, EXPERTS_TEXT)
    described = Text("scores-plot", "Scores by layer", f"{text[0]} The table has the quantiles.")
    rows = [(f"layer {step.layer}, {step.group}", *(f"{q:.3g}" for q in step.score_quantiles)) for step in steps]
    header = ("", "smallest", "25%", "median", "75%", "largest")
    table = Table("Quantiles by layer", header, rows, folded=True)
    label = "squared error" if is_obs and EXPERTS not in by_group else "score"
    plots = (spread_plot(described, spreads, label),)
    return Section("scores", "Score distributions by layer", tuple(text), plots, (table,))


def compensation(files: ResultFiles) -> Section | None:
    """Held-out error of each layer before and after the repair; nothing if the last round removed no units."""
    steps = [step for step in _last_round(files.steps) if step.error_before]
    if not steps:
        return None
    errors = {
        group: {step.layer: (_percent(step.error_before), _percent(step.error_after)) for step in of}
        for group, of in _by_group(steps).items()
    }
    before, after = _mean_errors(steps)
    text = (
        f"What the cut changes in a layer's output on held-out text, as a share of the output's energy: {before:.1f}% "
        f"on average, {after:.1f}% after compensation ({files.recipe.repair.compensate}). Points are means over "
        "domains, bars reach from the best domain to the worst.",
        f"Held-out text refused the compensation in {files.summary.guard_refusals} of {len(files.steps)} steps.",
    )
    described = Text("compensation-plot", "Held-out error by layer", f"{text[0]} The table has the means.")
    rows = [
        (f"layer {step.layer}, {step.group}", *(f"{error:.2f}%" for error in _mean_errors([step]))) for step in steps
    ]
    table = Table("Mean error by layer", ("", "before", "after"), rows, folded=True)
    title = "Error before and after compensation"
    return Section("compensation", title, text, (error_plot(described, errors, "% of output energy"),), (table,))


def rounds(files: ResultFiles) -> Section | None:
    """What every round kept and lost."""
    if not files.steps:
        return None
    numbers = sorted({step.round for step in files.steps})
    by_round = [[step for step in files.steps if step.round == number] for number in numbers]
    errors = [_mean_errors(steps) for steps in by_round]
    ends, rows = {}, []
    for end in files.rounds:
        perplexity = math.exp(_mean(list(end.nats_per_token.values())))
        ends[end.round] = (f"{end.num_params:,}", f"{perplexity:.2f}")
    for number, steps, (before, after) in zip(numbers, by_round, errors, strict=True):
        units = f"{sum(step.total for step in steps):,} → {sum(step.kept for step in steps):,}"
        seconds = sum(step.seconds for step in steps)
        cells = (units, f"{before:.2f}%", f"{after:.2f}%", f"{seconds:.1f}")
        rows.append((str(number), *cells, *ends.get(number, ())))
    header = ("round", "units", "error before", "error after", "seconds", *(ROUND_COLUMNS if ends else ()))
    table = Table("Rounds; errors are means over layers and domains", header, rows)
    if len(numbers) == 1:
        return Section("rounds", "Rounds", ("One round: measured once, cut once.",), (), (table,))
    described = Text("rounds-plot", "Held-out error by round", "Means over layers and domains, as in the table.")
    before, after = zip(*errors, strict=True)
    series = [Series("before compensation", "before", before), Series("after", "pruned", after)]
    plot = line_plot(described, numbers, series, "round", "% of output energy")
    return Section("rounds", "Rounds", (f"{len(numbers)} rounds, each measured anew.",), (plot,), (table,))


def calibration(files: ResultFiles) -> Section:
    """Which text, how much, and whether calibration saw held-out text."""
    facts, domains = files.summary.calibration, files.recipe.calibration.domains
    text = (
        f"{sum(facts.num_tokens.values()):,} tokens to measure on, {sum(facts.num_held_out_tokens.values()):,} that "
        f"guard the run and {sum(facts.num_judged_tokens.values()):,} that judge it, in blocks of "
        f"{facts.sequence_length}. A text too short for both judges by what guards. Overlap: the share of the judging "
        f"text's {NGRAM_TOKENS}-grams of tokens that the calibration text has too; boilerplate counts.",
        f"SHA-256 of all token blocks: {facts.content_hash}",
    )
    rows = [
        (
            *(name, f"{num:,}", f"{facts.num_held_out_tokens[name]:,}", f"{facts.num_judged_tokens[name]:,}"),
            *(overlap_cell(facts.held_out_overlap[name]), _source(domains[name])),
        )
        for name, num in facts.num_tokens.items()
    ]
    header = ("domain", "tokens", "guard", "judge", "overlap", "source")
    return Section("calibration", "Calibration set", text, (), (Table("Text by domain", header, rows),))


def reproduction(files: ResultFiles) -> Section:
    """The commands that make the result again, and what the run was made with."""
    summary = files.summary
    lines = [f"pip install secateur=={summary.versions['secateur']} torch=={summary.versions['torch'].split('+')[0]}"]
    lines += [f"pip install transformers=={summary.versions['transformers']}"]
    lines += [f"secateur prune {shlex.quote(summary.model)} OUT --recipe recipe.yaml"]
    made = f"This run: {summary.command}" if summary.command else "This run: secateur.prune, from Python"
    text = (
        made,
        "The recipe beside this page holds every option and the seed. On the same machine with the same versions the "
        "weights come out the same to the byte; the calibration hash tells whether the text is the same.",
    )
    return Section("reproduction", "How to reproduce", text, code="\n".join(lines))


def environment(files: ResultFiles) -> Section:
    """Cost, proof of reload, versions."""
    rows = [*note_rows(files.summary), *files.summary.versions.items()]
    table = Table("Cost, proof of reload, versions", (), rows, numbers=False)
    return Section("environment", "Run and environment", tables=(table,))


def recipe(files: ResultFiles) -> Section:
    """The resolved recipe."""
    return Section("recipe", "Recipe", ("Resolved: every default filled in.",), code=files.recipe_text.strip())


def _counts(steps: Sequence[GroupStep]) -> dict[str, dict[int, tuple[int, int]]]:
    """Return units before and kept, by group and layer."""
    before = {(step.group, step.layer): step.total for step in steps if step.round == 1}
    return {
        group: {step.layer: (before[group, step.layer], step.kept) for step in last}
        for group, last in _by_group(_last_round(steps)).items()
    }


def _last_round(steps: Sequence[GroupStep]) -> list[GroupStep]:
    last = max((step.round for step in steps), default=0)
    return [step for step in steps if step.round == last]


def _by_group(steps: Sequence[GroupStep]) -> dict[str, list[GroupStep]]:
    groups: dict[str, list[GroupStep]] = {}
    for step in sorted(steps, key=lambda step: step.layer):
        groups.setdefault(step.group, []).append(step)
    return groups


def _mean_errors(steps: Sequence[GroupStep]) -> tuple[float, float]:
    """Return the mean errors in percent before and after compensation; 0 without removals."""
    before, after = (
        [_mean(_percent(error)) for error in errors if error]
        for errors in ([step.error_before for step in steps], [step.error_after for step in steps])
    )
    return _mean(before), _mean(after)


def _percent(errors: dict[str, float] | None) -> list[float]:
    return [100 * error for error in (errors or {}).values()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _source(domain: Domain) -> str:
    key, value = domain.source
    known = {"installed": "installed packages", "sampled": "sampled from the dense model"}
    return known.get(key) or (", ".join(value) if key == "files" else f"{key} {value}")
