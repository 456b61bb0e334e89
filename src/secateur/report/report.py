"""`report.html`: what a run did, on one page that needs no network.

In: a result directory. Out: the page in it.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from secateur.errors import RecipeError
from secateur.facts import geometric_mean_perplexity
from secateur.files import check_file, staged_file
from secateur.report.page import KeyFigure, Page, Section, render
from secateur.report.records import ResultFiles, Summary, read_result
from secateur.report.rows import caveats, human_bytes, verdict
from secateur.report.sections_results import (
    SpeedFigures,
    distance,
    quality,
    recovery,
    recovery_figures,
    speed,
    speed_figures,
    tasks,
)
from secateur.report.sections_run import (
    calibration,
    compensation,
    depth,
    environment,
    recipe,
    reproduction,
    rounds,
    scores,
    widths,
)

PAGE_FILE = "report.html"

SECTIONS = (
    quality,
    recovery,
    tasks,
    distance,
    speed,
    depth,
    widths,
    scores,
    compensation,
    rounds,
    calibration,
    recipe,
    environment,
    reproduction,
)


def missing_plots() -> tuple[str, ...]:
    """Return why no report can be made here, or nothing."""
    if importlib.util.find_spec("matplotlib") is not None:
        return ()
    return (f"no {PAGE_FILE}: its plots need matplotlib; run pip install 'secateur[report]', then secateur report.",)


def write_report(directory: Path) -> Path:
    """Write `report.html` into a result directory from the other files there, and return its path.

    Everything is read before anything is written; the page appears complete or not at all.

    Raises RecipeError without matplotlib, CheckpointError for what is missing or unreadable in the directory, or
    cannot be written.
    """
    for reason in missing_plots():
        raise RecipeError(reason)
    files, path = read_result(directory), directory / PAGE_FILE
    check_file(path, overwrite=True)
    page = render(report_page(files))
    with staged_file(path, overwrite=True) as staged:
        staged.write_text(page, encoding="utf-8")
    return path


def report_page(files: ResultFiles) -> Page:
    """Return what the report of one run says."""
    summary = files.summary
    title = f"{summary.model}, pruned by secateur"
    sections = [section(files) for section in SECTIONS if _has_any(section, files)]
    rates = speed_figures(files)
    sentence = verdict(summary, {phase: ratio for phase, _, _, ratio in rates})
    figures = [*key_figures(summary, rates), *recovery_figures(files)]
    return Page(title, sentence, caveats(summary), figures, sections)


def _has_any(section: Callable[[ResultFiles], Section], files: ResultFiles) -> bool:
    """Say whether the run has done what the section is about: recovered, removed layers, cut widths."""
    if section is recovery:
        return files.recovery is not None
    if section is depth:
        return bool(files.removed_layers)
    return bool(files.steps) or section not in (widths, scores, compensation, rounds)


def key_figures(summary: Summary, rates: list[SpeedFigures]) -> list[KeyFigure]:
    """Return size, quality and speed, before and after."""
    dense, pruned = summary.dense_size, summary.pruned_size
    figures = [
        KeyFigure("parameters", f"of {dense.num_params:,}", f"{pruned.num_params / 1e6:,.1f} M"),
        KeyFigure("weights", f"from {human_bytes(dense.num_bytes)}", human_bytes(pruned.num_bytes)),
    ]
    if summary.dense_losses:
        before, after = (geometric_mean_perplexity(losses) for losses in (summary.dense_losses, summary.pruned_losses))
        figures.append(KeyFigure("held-out perplexity", f"from {before:.2f}", f"{after:.2f}"))
    for phase, before, after, ratio in rates:
        figures.append(KeyFigure(phase, f"{before:,.1f} → {after:,.1f} tokens/s", f"{ratio:.2f}x"))
    return figures
