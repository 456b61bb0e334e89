"""`report.html`: what a run did, on one page that needs no network. In: a result directory."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from secateur.errors import CheckpointError, RecipeError
from secateur.facts import geometric_mean_perplexity
from secateur.files import check_file, staged_file
from secateur.report import sections_results as results
from secateur.report import sections_run as run
from secateur.report.digests import write_summary
from secateur.report.measured import BENCH_FILE, EVALUATION_FILE, Evaluation
from secateur.report.page import KeyFigure, Page, Section, render
from secateur.report.records import PAGE_FILE, ResultFiles, Summary, read_result
from secateur.report.rows import caveats, human_bytes, verdict
from secateur.report.vocabulary import vocabulary

OF_WIDTHS = (run.widths, run.scores, run.compensation, run.rounds)
SECTIONS = (
    *(results.quality, results.polish, results.recovery, results.tasks, results.distance, results.speed),
    *(vocabulary, run.depth, *OF_WIDTHS, run.calibration, run.recipe, run.environment, run.reproduction),
)


def missing_plots() -> tuple[str, ...]:
    """Return why no report can be made here, or nothing."""
    if importlib.util.find_spec("matplotlib") is not None:
        return ()
    return (f"no {PAGE_FILE}: its plots need matplotlib; run pip install 'secateur[report]', then secateur report.",)


def complete(directory: Path, summary: Summary) -> Summary:
    """Write `result.json` with all digests, and the page if it can be made; return the summary."""
    summary = write_summary(directory, summary)
    if not missing_plots():
        write_report(directory, other_dense=True)  # its tables name the model
    return summary


def write_report(directory: Path, *, other_dense: bool = False) -> Path:
    """Write `report.html` into a result directory from the other files there; return its path.

    `other_dense`: it may show figures against another model than the one that was pruned. Raises
    RecipeError without matplotlib, CheckpointError for files that cannot be read or written.
    """
    for reason in missing_plots():
        raise RecipeError(reason)
    files, path = read_result(directory), directory / PAGE_FILE
    if not other_dense:
        _check_dense(directory, files)
    check_file(path, overwrite=True)
    page = render(report_page(files))
    with staged_file(path, overwrite=True) as staged:
        staged.write_text(page, encoding="utf-8")
    return path


def _check_dense(directory: Path, files: ResultFiles) -> None:
    """Raise CheckpointError if evaluation or bench took another model as dense than the one that was pruned."""
    known = {each.fingerprint for each in files.summary.lineage}
    if None in known or not known:  # an older version's result, or that of a model in memory
        return
    measured = {EVALUATION_FILE: files.evaluation, BENCH_FILE: files.bench}
    for name, found in measured.items():
        if found is not None and found.dense_fingerprint not in (None, *known):
            dense = found.against if isinstance(found, Evaluation) else found.dense and found.dense.model
            raise CheckpointError(
                f"{directory / name}: was measured against {dense}, and the result was pruned from "
                f"{files.summary.lineage[-1].name}; measure again, or give --other-dense to show it."
            )


def report_page(files: ResultFiles) -> Page:
    """Return the report of one run."""
    summary = files.summary
    title = f"{summary.model}, pruned by secateur"
    sections = [section(files) for section in SECTIONS if _has_any(section, files)]
    rates = results.speed_figures(files)
    sentence = verdict(summary, {phase: ratio for phase, _, _, ratio in rates})
    figures = [*key_figures(summary, rates), *results.recovery_figures(files)]
    return Page(title, sentence, caveats(summary), figures, sections)


def _has_any(section: Callable[[ResultFiles], Section], files: ResultFiles) -> bool:
    """Whether the run did what the section is about: polish, recover, trim tokens, remove layers, cut widths."""
    if section is vocabulary:
        return files.summary.vocabulary is not None
    if section is results.polish:
        return files.summary.polish is not None
    if section is results.recovery:
        return files.recovery is not None
    if section is run.depth:
        return bool(files.removed_layers)
    return bool(files.steps) or section not in OF_WIDTHS


def key_figures(summary: Summary, rates: list[results.SpeedFigures]) -> list[KeyFigure]:
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
