"""Tasks before and after a recovery: the harness's own scores, in the record, the table, the card and the page."""

import io
from pathlib import Path
from typing import Any

import pytest
from recipes import grouped
from rich.console import Console

import secateur
from secateur.evaluation import rows as evaluate_rows
from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.tasks import quiet_harness
from secateur.report.measured import RecoveryRecord, TaskScore
from secateur.report.rows_measured import recovery_table, recovery_task_table

pytest.importorskip("lm_eval")

LETTERS = ["A", "B", "C", "D"]
ARC = [
    {
        "id": f"q{number}",
        "question": f"What comes after {number}?",
        "choices": {"text": [str(number + step) for step in (1, 2, 10, -3)], "label": LETTERS},
        "answerKey": LETTERS[number % 4],
    }
    for number in range(8)
]
TRAINING = {"num_tokens": 1024, "batch_tokens": 128, "learning_rate": 1e-3, "evaluations": 1}
ASKED = {"recover": {**TRAINING, "evaluation": {"tasks": ["arc_easy"], "limit": 5}}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The task's rows as save_to_disk writes them, and none that are installed."""
    import datasets

    directory = tmp_path_factory.mktemp("tasks-data")
    with quiet_harness():
        splits = {split: datasets.Dataset.from_list(ARC) for split in ("train", "validation", "test")}
        datasets.DatasetDict(splits).save_to_disk(directory / "allenai/ai2_arc/ARC-Easy")
    return directory


@pytest.fixture(scope="module")
def models(checkpoints, recipe, saved, tmp_path_factory) -> dict[str, Path]:
    """The dense model, a pruned one, and the pruned one recovered with a task asked before and after."""
    place = tmp_path_factory.mktemp("models")
    secateur.prune(checkpoints["llama"], grouped({**recipe, "remove": 0.3}), out=place / "pruned")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate_rows, "PACKAGE", "no-such-package")
        secateur.recover(place / "pruned", checkpoints["llama"], ASKED, out=place / "recovered", tasks_data=saved)
    assert sorted(path.name for path in place.iterdir()) == ["pruned", "recovered"]
    return {"dense": checkpoints["llama"], "pruned": place / "pruned", "recovered": place / "recovered"}


@pytest.fixture(scope="module")
def record(models) -> RecoveryRecord:
    return RecoveryRecord.from_json(
        (models["recovered"] / "recovery.json").read_text(encoding="utf-8"), "recovery.json"
    )


def test_every_score_is_what_evaluate_says_of_that_model(models, record, saved, tmp_path):
    asked = {"tasks": ("arc_easy",), "limit": 5, "tasks_data": saved}
    for which, model in models.items():
        scores = evaluate(model, out=tmp_path / which, **asked).pruned.scores
        assert getattr(record.tasks, which) == scores and set(scores["arc_easy"]) == {"acc,none", "acc_norm,none"}
    found = evaluate(models["recovered"], models["pruned"], out=tmp_path / "gain", other_dense=True, **asked)
    assert found.differences is not None and found.differences.tasks is not None and record.tasks is not None
    gain = found.differences.tasks["arc_easy"]["acc,none"]
    assert record.tasks.gains["arc_easy"]["acc,none"] == TaskScore(gain.difference, gain.standard_error)


def test_the_table_the_card_and_the_page_show_the_scores(models, record):
    rows = {label: cells for label, *cells in recovery_task_table(record).rows}
    assert set(rows) == {"arc_easy, acc", "arc_easy, acc_norm"} and all(len(cells) == 4 for cells in rows.values())
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(recovery_table(record))
    shown = console.export_text()
    card = (models["recovered"] / "README.md").read_text(encoding="utf-8")
    page = (models["recovered"] / "report.html").read_text(encoding="utf-8")
    for cell in rows["arc_easy, acc"]:
        assert cell in shown and cell in card and cell in page
    assert "at most 5 questions each" in " ".join(shown.split())


def test_an_unknown_task_is_refused_before_anything_runs(models, tmp_path):
    asked = {"recover": {**TRAINING, "evaluation": {"tasks": ["arc_esay"]}}}
    seen: list[Any] = []
    with pytest.raises(secateur.RecipeError, match="did you mean 'arc_easy'"):
        secateur.recover(
            models["pruned"], models["dense"], asked, out=tmp_path / "out", progress=lambda *step: seen.append(step)
        )
    assert not seen and list(tmp_path.iterdir()) == []
