"""What people read of a result: `report.html`, one page that needs no network, and the card. In: its directory."""

from collections.abc import Callable
from pathlib import Path

from secateur.errors import CheckpointError
from secateur.files import check_file, staged_file
from secateur.log import human_bytes
from secateur.recipe import Recipe
from secateur.recipe_file import RECIPE_FILE, load_recipe, parse_recipe
from secateur.report import sections
from secateur.report.card import card_data, model_card, recovered_card, with_metadata
from secateur.report.measured import ALIKE, Evaluation, RecoveryRecord
from secateur.report.page import KeyFigure, Page, Section, render
from secateur.report.records import ResultFiles, Summary, read_result, read_summary
from secateur.report.rows import OTHER_TEXT, beside_verdict, caveats, verdict
from secateur.result_directory import BENCH_FILE, EVALUATION_FILE, PAGE_FILE, RESULT_FILE, write_summary

CARD_FILE = "README.md"
# Each returns None where the run has nothing of what it is about.
SECTIONS: tuple[Callable[[ResultFiles], Section | None], ...] = (
    sections.quality,
    sections.samples,
    sections.speed,
    sections.removed,
    sections.text,
    sections.repeat,
)


def write_pages(directory: Path, summary: Summary, recipe: Recipe) -> Summary:
    """Write card, `result.json` and page of a finished run; return the summary as it was written."""
    (directory / CARD_FILE).write_text(model_card(summary, recipe), encoding="utf-8")
    return _complete(directory, summary)


def write_recovered_pages(directory: Path, record: RecoveryRecord) -> None:
    """Add a recovery to the card of the directory, if it has one; write digests and page if it is a result."""
    path, is_result = directory / CARD_FILE, (directory / RESULT_FILE).is_file()
    text = recovered_card(path.read_text(encoding="utf-8") if path.is_file() else None, record)
    if is_result:
        recipe = parse_recipe(load_recipe(directory / RECIPE_FILE), "recipe")
        text = with_metadata(text, card_data(read_summary(directory), recipe))
    path.write_text(text, encoding="utf-8")
    if is_result:
        _complete(directory, read_summary(directory))


def _complete(directory: Path, summary: Summary) -> Summary:
    """Write `result.json` with all digests, and the page; return the summary."""
    summary = write_summary(directory, summary)
    write_report(directory, other_dense=True)  # its tables name the model
    return summary


def write_report(directory: Path, *, other_dense: bool = False) -> Path:
    """Write `report.html` into a result directory; return its path.

    `other_dense`: it may show figures against another model than the one that was pruned. Raises
    CheckpointError for files that cannot be read or written.
    """
    files, path = read_result(directory), directory / PAGE_FILE
    if not other_dense:
        _check_dense(directory, files)
    html = render(report_page(files))
    check_file(path, overwrite=True)
    with staged_file(path, overwrite=True) as staged:
        staged.write_text(html, encoding="utf-8")
    return path


def _check_dense(directory: Path, files: ResultFiles) -> None:
    """Raise CheckpointError if evaluation or bench took another model as dense than the one that was pruned."""
    known = {each.fingerprint for each in files.summary.lineage}
    if None in known:  # the result of a model in memory
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
    shown = [section for make in SECTIONS if (section := make(files)) is not None]
    rates = sections.speed_figures(files)
    tasks = files.evaluation is not None and files.evaluation.pruned.tasks is not None
    beside = beside_verdict(summary, {phase: ratio for phase, _, _, ratio in rates}, asked_tasks=tasks)
    title = f"{summary.model}, pruned by secateur"
    return Page(title, f"{verdict(summary)}.", caveats(summary), key_figures(summary, rates), shown, beside)


def key_figures(summary: Summary, rates: list[sections.SpeedFigures]) -> list[KeyFigure]:
    """Return size, quality and speed, before and after."""
    dense, pruned = summary.dense_size, summary.pruned_size
    figures = [
        KeyFigure("parameters", f"of {dense.num_params:,}", f"{pruned.num_params / 1e6:,.1f} M"),
        KeyFigure("weights", f"from {human_bytes(dense.num_bytes)}", human_bytes(pruned.num_bytes)),
    ]
    if (answers := summary.own_answers) is not None:
        error = f"± {answers.standard_error:.2f}, the dense model's to {answers.num_prompts} prompts"
        figures.append(KeyFigure("nats a token, own answers", error, f"{answers.nats_lost:+.2f}"))
    if (other := summary.other_text) is not None:
        before, after = (loss.perplexity for loss in other)
        figures.append(KeyFigure(f"perplexity, {OTHER_TEXT}", f"from {before:.2f}", f"{after:.2f}"))
    for phase, before, after, ratio in rates:
        spread = f"{ratio.lowest:.2f} to {ratio.highest:.2f} times, {before:,.1f} → {after:,.1f} tokens/s"
        figures.append(KeyFigure(phase, spread, f"{ratio.median:.2f}x" if ratio.is_told else ALIKE))
    return figures
