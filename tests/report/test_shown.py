"""Whole records as people see them: terminal, card and page, line by line."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from shown import assert_shown

from secateur import facts
from secateur.evaluation.study import Comparison, FoundCell, Study, comparison_table, save_comparison
from secateur.recipe import Recipe
from secateur.report import records, rows
from secateur.report.page import Page, Table
from secateur.report.records import ModelFigures, SpeedUp, Spread, TaskResults, TaskScore, change
from secateur.report.report import measurement_page, measurement_table, model_card, recovered_card, report_page

DIGEST, VERSIONS = "abcdef0123456789" * 4, {"secateur": "1.2", "torch": "2.9+cpu", "transformers": "5.1"}


def verdicts(kl: float, nats: float) -> dict[str, facts.Verdict]:
    """Two domains, the second a little worse and of one document."""
    return {
        "prose": facts.Verdict(kl, 0.02, nats, 0.875, 4000, kl + 0.1),
        "code": facts.Verdict(kl + 0.2, None, nats + 1, 0.5, 1000, kl),
    }


def recipe(**calibration: object) -> Recipe:
    domains = {"prose": {"files": ["/home/me/a.txt"]}, "code": {"dataset": "owner/code"}}
    return Recipe.model_validate({"calibration": {"domains": domains, **calibration}})


FACTS = records.CalibrationFacts(
    content_hash="0123456789abcdef" * 4,
    sequence_length=512,
    num_tokens={"prose": 10240, "code": 20480},
    num_held_out_tokens={"prose": 1024, "code": 2048},
    held_out_overlap={"prose": 0.0123, "code": 0.256},
    num_judged_tokens={"prose": 4096, "code": 8192},
    judged_hash="0" * 64,
    allotted={},
)
BEFORE = {"prose": facts.Loss.of([30.0, 60.0], [10, 20]), "code": facts.Loss.of([20.0, 24.0], [10, 10])}
AFTER = {"prose": facts.Loss.of([33.0, 69.0], [10, 20]), "code": facts.Loss.of([21.0, 22.0], [10, 10])}
OTHER = facts.Loss.of([90.0, 120.0, 100.0], [30, 40, 30]), facts.Loss.of([105.0, 160.0, 125.0], [30, 40, 30])
ANSWERS = facts.OwnAnswers(
    num_prompts=48,
    num_tokens=3000,
    dense_nats=0.75,
    nats=1.17,
    standard_error=0.031,
    same_first=0.812,
    ended=(0.9, 0.85),
    repeated=(0.02, 0.055),
    shown=(facts.AnswerPair("Why is the sky blue?", "Because of\nscattering.", "Because because."),),
)
FULL = records.Summary(
    model="small-model",
    family="llama",
    command="secateur prune small-model out --remove 0.2",
    remove_asked=0.2,
    remove_reached=0.1973,
    dense_size=facts.Size(134_500_000, 269_000_000),
    pruned_size=facts.Size(107_963_000, 215_926_000),
    num_layers=(30, 28),
    widths={"ffn": (1536, 1024, 1280), "kv_heads": (3, 2, 2)},
    calibration=FACTS,
    dense_losses=BEFORE,
    pruned_losses=AFTER,
    guard_refusals=2,
    seconds={"read": 1.25, "prune": 60.5},
    peak_bytes=1_500_000_000,
    reload_max_abs_difference=0.00123,
    loaded_by="AutoModelForCausalLM",
    warnings=("the text of code is short.",),
    versions=VERSIONS,
    device="cpu",
    device_peak_bytes=None,
    polish=records.PolishRecord(
        settings={},
        num_held_out_tokens=2048,
        dense=verdicts(0.0, 2.0),
        before=verdicts(0.4, 2.5),
        training=facts.TrainingRecord(50_000, 30.0, verdicts(0.1, 2.25), held=True),
    ),
    other_text=OTHER,
    own_answers=ANSWERS,
    vocabulary=records.VocabularyFacts(
        num_before=49152,
        num_after=32768,
        by_domain={"prose": (1000, 1020), "code": (2000, 2100)},
        scripts={"latin": (900, 800), "greek": (40, 10), "thai": (15, 0), "runic": (20, 20)},
        nats={"prose": (3.0, 3.125), "code": (2.0, 2.25)},
        foretold=0.15,
    ),
    like=None,
    measured=None,
    foretold={},
    lineage=(
        facts.Ancestor("first/model", "f" * 64, 200_000_000, hub_id="first/model", license="mit", languages=("en",)),
        facts.Ancestor("small-model", DIGEST, 134_500_000, license="apache-2.0", languages=("en", "fr")),
    ),
)
BARE = dataclasses.replace(
    FULL,
    command="",
    num_layers=(30, 30),
    widths={"ffn": (1536, 1024, 1024)},
    dense_losses={},
    pruned_losses={},
    guard_refusals=0,
    reload_max_abs_difference=None,
    warnings=(),
    calibration=dataclasses.replace(FACTS, held_out_overlap={"prose": 0.1, "code": None}),
    polish=None,
    other_text=None,
    own_answers=None,
    vocabulary=None,
    lineage=(facts.Ancestor("small-model", None, 134_500_000),),
)
NO_GAIN = facts.TrainingRecord(50_000, 30.0, verdicts(0.5, 2.75), held=False)
# Trained without a gain, refused once, of one ancestor; no domain lost, one is a single document; no answers.
IDLE = dataclasses.replace(
    FULL,
    dense_losses={"prose": AFTER["prose"], "code": facts.Loss.of([21.0], [10])},
    pruned_losses={"prose": BEFORE["prose"], "code": facts.Loss.of([20.0], [10])},
    guard_refusals=1,
    own_answers=None,
    vocabulary=dataclasses.replace(FULL.vocabulary, nats={}, foretold=None, scripts={"latin": (900, 900)}),
    polish=dataclasses.replace(FULL.polish, training=NO_GAIN),
    lineage=FULL.lineage[1:],
)


def spread(middle: float, part: float) -> Spread:
    return Spread(middle, middle * (1 - part), middle * (1 + part))


def figures(name: str, scale: float) -> ModelFigures:
    speed = records.Speed(spread(1234.5 * scale, 0.1), spread(12.34 * scale, 0.1))
    costs = facts.Costs(2.5e8 / scale, 3.21e9 / scale, 11_520)
    return ModelFigures(name, "bfloat16", facts.Size(int(1e8 / scale), int(2e8 / scale)), costs, speed)


BENCH = records.BenchResult(
    device="cpu",
    num_threads=2,
    workload=facts.Workload(batch=1, prompt_tokens=256, new_tokens=32, repeats=5),
    models={"dense": figures("small-model", 1.0), "pruned": figures("small-model-pruned", 1.25)},
    speed_ups={"prefill": SpeedUp(Spread(1.2, 1.1, 1.3), 1.25), "decode": SpeedUp(Spread(1.04, 0.97, 1.1), 1.25)},
    versions=VERSIONS,
    notes=("the machine was busy.",),
)
ALONE = {"model": BENCH.models["pruned"]}
BENCH_ALONE = dataclasses.replace(BENCH, num_threads=1, models=ALONE, speed_ups={}, notes=())
BENCH_GPU = dataclasses.replace(BENCH, device="cuda")


def measured(losses: dict[str, facts.Loss], other: facts.Loss, accuracy: float) -> records.Measured:
    scores = {"acc,none": accuracy, "acc_stderr,none": 0.05, "f1,strict": 0.3, "f1_stderr,strict": "N/A"}
    tasks = TaskResults({"copa": {"alias": "copa", **scores}}, {"copa": "a file"}, "0.4.9")
    qualities = {name: records.Quality.on(4 * loss.num_tokens, loss) for name, loss in losses.items()}
    return records.Measured(qualities, records.Quality.on(400, other), tasks)


EVALUATION = records.Evaluation(
    model="out",
    against="small-model",
    notes=("the text of code is short.",),
    dense=measured(BEFORE, OTHER[0], 0.75),
    pruned=measured(AFTER, OTHER[1], 0.5),
    kl=verdicts(0.3, 2.5),
    differences=records.Differences(
        domains={name: change(BEFORE[name], AFTER[name]) for name in BEFORE},
        other_text=change(*OTHER),
        tasks={"copa": {"acc,none": TaskScore(-0.25, 0.06), "f1,strict": TaskScore(0.0, None)}},
    ),
    versions=VERSIONS,
    own_answers=ANSWERS,
)
ONE_TASK = dataclasses.replace(EVALUATION.pruned, tasks=TaskResults({"copa": {"acc,none": 0.5}}, {}, "0.4.9"))
OF_BOTH = dict.fromkeys(("against", "dense", "kl", "differences", "own_answers"))
EVALUATION_ALONE = dataclasses.replace(EVALUATION, notes=(), pruned=ONE_TASK, **OF_BOTH)
RECOVERY = records.RecoveryRecord(
    pruned="out",
    teacher="small-model",
    command="secateur recover out better",
    calibration={},
    settings={},
    seed=0,
    content_hash="0" * 64,
    sequence_length=512,
    num_held_out_tokens=2048,
    dense=verdicts(0.0, 2.0),
    before=verdicts(0.4, 2.5),
    training=facts.TrainingRecord(100_000, 40.0, verdicts(0.2, 2.25), held=True),
    seconds={"train": 40.0},
    peak_bytes=2_000_000_000,
    reload_max_abs_difference=0.5,
    notes=("the text was read twice.",),
    versions=VERSIONS,
    judged={
        "dense": facts.Judgement(BEFORE, OTHER[0]),
        "pruned": facts.Judgement(AFTER, OTHER[1], ANSWERS),
        "recovered": facts.Judgement(BEFORE, OTHER[0], dataclasses.replace(ANSWERS, nats=0.85)),
    },
)
NOT_HELD = facts.TrainingRecord(100_000, 0.0, verdicts(0.2, 2.25), held=False)
UNDONE = dataclasses.replace(RECOVERY, command="", judged={}, notes=(), training=NOT_HELD)
FFN = records.GroupFacts("ffn", "channel", 30, 1536, 1024, 1728, 26_500_000)
HEADS = records.GroupFacts("kv_heads", "head", 30, 3, 3, 294_912, 9_000_000)
INSPECTION = records.Inspection(
    model="small-model",
    family="llama",
    dtype="bfloat16",
    size=facts.Size(134_500_000, 269_000_000),
    num_layers=(30, 28),
    groups=(FFN,),
    remove_asked=0.2,
    remove_reached=0.1973,
    largest_remove=0.6,
    align=64,
    num_params_after=107_963_000,
    num_bytes_after=215_926_000,
    num_calibration_tokens=131_072,
    memory=records.MemoryEstimate(400_000_000, 50_000_000, 20_000_000, 30_000_000, 90_000_000, 700_000_000),
    weights_on_disk=True,
    disk_bytes=900_000_000,
    device="cpu",
    warnings=("more than half of it goes.",),
    possible=(FFN, HEADS),
    impossible={"experts": "it has none"},
    num_tokens=49_152,
    num_token_params=28_311_552,
    files={"f16": (270_000_000, 216_000_000), "q4_k_m": (90_000_000, 75_000_000)},
    files_problem="q8_0 is left out",
)
IN_MEMORY = records.MemoryEstimate(400_000_000, 50_000_000, 20_000_000, 30_000_000)
NO_FILES = {"files": {}, "files_problem": "llama.cpp runs no such family"}
NO_MORE = {"num_layers": (30, 30), "warnings": (), "possible": (FFN,), "impossible": {}}
INSPECTION_BARE = dataclasses.replace(INSPECTION, memory=IN_MEMORY, weights_on_disk=False, **NO_FILES, **NO_MORE)


def cost(removed: float, *lost: float) -> records.SizeCost:
    judged = dict(zip(("own answers", "other text", "prose", "code"), lost, strict=True))
    num_params = int(134_500_000 * (1 - removed))
    return records.SizeCost(removed, num_params, judged, {"f16": 2 * num_params, "q4_k_m": num_params // 2})


TENTH, FOUR_TENTHS = cost(0.1, 0.04, 0.06, 0.05, 0.07), cost(0.4, 1.2, 1.5, 1.4, 1.6)
MEASUREMENT = records.Measurement(
    model="small-model",
    command="secateur measure small-model sizes",
    dense_size=facts.Size(134_500_000, 269_000_000),
    calibration=FACTS,
    probes=(TENTH, cost(0.2, 0.2, 0.3, 0.25, 0.35), FOUR_TENTHS),
    sizes=(cost(0.05, 0.01, 0.02, 0.01, 0.02), TENTH, cost(0.25, 0.4, 0.5, 0.4, 0.5), FOUR_TENTHS),
    band=0.123,
    units=0.7,
    pace=((0.0009, 0.09), (0.0008, 0.08), (0.0006, 0.06)),
    seconds={"cut": 30.0},
    warnings=("the text of code is short.",),
    versions=VERSIONS,
    text_hash="0" * 64,
    lineage=(),
    profiles=(),
)


def scaled(loss: facts.Loss, scale: float) -> tuple[float, ...]:
    return tuple(scale * nats for nats in loss.document_nats)


def cell(method: str, ratio: float, seed: int, scale: float) -> FoundCell:
    losses = {
        name: facts.Loss(scale * loss.nats_per_token, None, loss.num_tokens, scaled(loss, scale), loss.document_tokens)
        for name, loss in BEFORE.items()
    }
    return FoundCell(
        method=method,
        ratio=ratio,
        seed=seed,
        remove_reached=ratio * 0.99,
        seconds=10.0 * scale,
        losses=losses,
        tasks={
            "copa": {"acc,none": 0.75 / scale, "acc_stderr,none": 0.05},
            "piqa": {"acc_norm,none": 0.5 / scale, "acc_norm_stderr,none": 0.03},
        },
        num_tokens={"prose": 640, "code": 1280},
        others={"poems": facts.Loss(4 * scale, None, 1)},
    )


CELLS = tuple(
    cell(method, ratio, seed, scale + 0.01 * seed)
    for seed in (0, 1)
    for method, ratio, scale in (("dense", 0.0, 1.0), ("ours", 0.2, 1.1), ("theirs", 0.2, 1.2), ("ours", 0.4, 1.3))
)
GRID = {"model": "small-model", "ratios": [0.2, 0.4], "seeds": [0, 1], "methods": {"ours": {}, "theirs": {}}}
GRID |= {"evaluation": {"num_blocks": 8, "tasks": ["copa", "piqa"], "limit": 100}}
GRID |= {"recipe": {"calibration": {"sequence_length": 512}}}
STUDY = Study.model_validate({"question": "Which is best?", **GRID})
FIRST_ROUND = (1, 1, "ffn", 1400, 1536), (1, 0, "ffn", 1300, 1536), (1, 1, "kv_heads", 3, 3)
SECOND_ROUND = (2, 1, "ffn", 1280, 1400), (2, 0, "ffn", 1024, 1300), (2, 1, "kv_heads", 2, 3)
FILES = records.ResultFiles(
    summary=FULL,
    removed_layers=(records.RemovedLayer(7, 2, 0.03, {"prose": 0.25, "code": 0.5}), records.RemovedLayer(9)),
    steps=tuple(records.GroupStep(*each) for each in (*FIRST_ROUND, *SECOND_ROUND)),
    recipe=recipe(),
    evaluation=EVALUATION,
    bench=BENCH,
    recovery=RECOVERY,
)


BARE_FILES = records.ResultFiles(BARE, (), (), recipe(), None, None, None)
IDLE_FILES = records.ResultFiles(IDLE, (), FILES.steps, recipe(), EVALUATION_ALONE, BENCH_ALONE, UNDONE)


def in_terminal(tables: rows.Tables) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def plain(page: Page) -> str:
    """Return all that a page says, without what it looks like."""
    lines = [page.title, page.verdict, page.beside, *(f"note: {note}" for note in page.notes)]
    for section in page.sections:
        lines += ["", f"== {section.name}: {section.title}", *section.text]
        for table in section.tables:
            lines += _plain_table(table)
        if section.chart is not None:
            lines += [section.chart.caption, f"up to {section.chart.top}"]
            lines += [f"{name}: {points}" for name, points in section.chart.lines.items()]
            lines += [f"{name} at {share}" for name, share in section.chart.marks.items()]
        lines += section.code.splitlines()
    return "\n".join(lines)


def _plain_table(table: Table) -> list[str]:
    looks = [name for name, holds in (("numbers", table.header), ("folded", table.folded)) if holds]
    lines = [f"-- {table.caption} {looks}", " | ".join(table.header), *map(" | ".join, table.rows)]
    return lines + [f"bars {[round(bar, 4) for bar in bars]}" for bars in table.bars if bars]


def study_page(folder: Path, cells: tuple[FoundCell, ...]) -> str:
    save_comparison(STUDY, Comparison(cells, VERSIONS), folder)
    return (folder / "table.md").read_text(encoding="utf-8")


TEXTS: dict[str, Callable[[Path], str]] = {
    "summary": lambda _: in_terminal(rows.summary_table(FULL)),
    "summary-idle": lambda _: in_terminal(rows.summary_table(IDLE)),
    "summary-bare": lambda _: in_terminal(rows.summary_table(BARE)),
    "card": lambda _: model_card(FULL, recipe()),
    "card-idle": lambda _: model_card(dataclasses.replace(IDLE, widths=BARE.widths), recipe()),
    "card-bare": lambda _: model_card(BARE, recipe()),
    "card-recovered": lambda _: recovered_card(model_card(BARE, recipe()), RECOVERY),
    "card-undone": lambda _: recovered_card(None, UNDONE),
    "page": lambda _: plain(report_page(FILES)),
    "page-bare": lambda _: plain(report_page(BARE_FILES)),
    "page-idle": lambda _: plain(report_page(IDLE_FILES)),
    "inspection": lambda _: in_terminal(rows.inspection_table(INSPECTION)),
    "inspection-bare": lambda _: in_terminal(rows.inspection_table(INSPECTION_BARE)),
    "evaluation": lambda _: in_terminal(rows.evaluation_table(EVALUATION)),
    "evaluation-alone": lambda _: in_terminal(rows.evaluation_table(EVALUATION_ALONE)),
    "bench": lambda _: in_terminal(rows.bench_table(BENCH)),
    "bench-alone": lambda _: in_terminal(rows.bench_table(BENCH_ALONE)),
    "bench-gpu": lambda _: in_terminal(rows.bench_table(BENCH_GPU)),
    "recovery": lambda _: in_terminal(rows.recovery_table(RECOVERY)),
    "recovery-undone": lambda _: in_terminal(rows.recovery_table(UNDONE)),
    "measurement": lambda _: in_terminal(measurement_table(MEASUREMENT)),
    "measurement-page": lambda _: plain(measurement_page(MEASUREMENT)),
    "study": lambda _: in_terminal(comparison_table(Comparison(CELLS, VERSIONS))),
    "study-page": lambda folder: study_page(folder, CELLS),
    "study-page-one-draw": lambda folder: study_page(folder, CELLS[: len(CELLS) // 2]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_people_see_is_what_was_read(name, tmp_path):
    assert_shown(f"report/{name}", TEXTS[name](tmp_path))
