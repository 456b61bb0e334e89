"""Studies of several models: a grid each, in tokens of its own, and tables that compare what can be compared."""

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from bpe_tokenizer import bpe_tokenizer
from models import tiny_llama
from page_checks import PageChecks
from run_cli import run_cli
from tiny_tokenizer import tiny_tokenizer

from secateur.errors import RecipeError
from secateur.evaluation.compare import compare
from secateur.evaluation.study import Comparison, FoundCell, Study, load_study
from secateur.evaluation.study_page import overview, verdict

TEXTS = {"left": "the quick brown fox jumps over the lazy dog {}\n", "right": "0123 + {} = 4567;\n"}
TOKENIZERS = {"bytes": tiny_tokenizer, "pieces": bpe_tokenizer}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with the same weights and different tokenizers, two domains, and a study of both models."""
    place, domains = tmp_path_factory.mktemp("several"), {}
    for name, tokenizer in TOKENIZERS.items():
        tiny_llama(num_layers=2).save_pretrained(place / name)
        tokenizer().save_pretrained(place / name)
    for name, line in TEXTS.items():
        (place / f"{name}.txt").write_text("".join(line.format(number) for number in range(2000)))
        domains[name] = {"files": [str(place / f"{name}.txt")]}
    wanda = {"choose": {"score": "wanda"}, "repair": {"compensate": "none"}}
    study = {
        "question": "Which?",
        "model": [str(place / name) for name in TOKENIZERS],
        "ratios": [0.2],
        "seeds": [0, 1],
        "recipe": {
            "polish": False,
            "remove": {"align": 8},
            "calibration": {"num_tokens": 640, "sequence_length": 32, "domains": domains},
        },
        "evaluation": {"num_blocks": 2},
        "methods": {"ours": {}, "wanda": {"recipe": wanda}},
    }
    (place / "study.yaml").write_text(yaml.safe_dump(study))
    return place


@pytest.fixture(scope="module")
def results(place: Path) -> dict[str, Comparison]:
    """One model, then both in the same directory; the other one elsewhere."""
    study, found = str(place / "study.yaml"), {}
    found["bytes"] = compare(study, place / "out", model=str(place / "bytes"))
    before = {path: path.stat().st_mtime_ns for path in (place / "out" / "cells").iterdir()}
    found["both"] = compare(study, place / "out")
    after = {path: path.stat().st_mtime_ns for path in (place / "out" / "cells").iterdir()}
    assert len(before) == 6 and len(after) == 12 and before.items() <= after.items()
    found["pieces"] = compare(study, place / "alone", model=[str(place / "pieces")])
    return found


def test_each_model_has_a_grid_of_its_own_in_its_own_tokens(results: dict[str, Comparison]) -> None:
    both = results["both"].cells
    order = [("dense", 0.0), ("ours", 0.2), ("wanda", 0.2)]
    assert [(cell.seed, cell.model, (cell.method, cell.ratio)) for cell in both] == [
        (seed, model, each) for seed in (0, 1) for model in TOKENIZERS for each in order
    ]
    for model in TOKENIZERS:
        # Cells of a study of one model stand for that model alone, and are not another model's.
        assert tuple(replace(cell, seconds=0.0) for cell in both if cell.model == model) == tuple(
            replace(cell, seconds=0.0) for cell in results[model].cells
        )
    first, second = ([cell for cell in both if cell.model == model] for model in TOKENIZERS)
    assert all(one.nats_per_token != other.nats_per_token for one, other in zip(first, second, strict=True))
    assert results["bytes"].cells[1].seconds == both[1].seconds  # read, not run again


def test_tables_have_ratios_to_the_own_dense_and_name_the_model(place: Path, results: dict[str, Comparison]) -> None:
    out, cells = place / "out", list(results["both"].cells)
    nats = {(cell.model, cell.method, cell.seed): statistics.mean(cell.nats_per_token.values()) for cell in cells}
    over = {model: [nats[model, "wanda", seed] - nats[model, "dense", seed] for seed in (0, 1)] for model in TOKENIZERS}
    means = [statistics.mean(each) for each in over.values()]
    errors = [abs(each[0] - each[1]) / 2 for each in over.values()]
    text = (out / "table.md").read_text()
    times = [math.exp(each) for each in (statistics.mean(means), *means)]
    assert "| wanda | 20% | " + " | ".join(f"{each:.2f}" for each in times) + " |\n" in text
    shown = zip((statistics.mean(means), *means), (statistics.mean(errors), *errors), strict=True)
    row = " | ".join(f"{mean:+.3f}" + (f" ± {error:.3f}" if round(error, 3) else "") for mean, error in shown)
    assert f"| wanda | 20% | {row} |\n" in text
    assert "| dense |" not in text.split("## bytes: ")[0]
    captions = re.findall("^## (.*)$", text, re.MULTILINE)
    assert [caption.partition(":")[0] for caption in captions[2:]] == ["bytes", "bytes", "pieces", "pieces"]
    assert all("own dense" in caption for caption in captions[:2]) and "per token of each model's own dense" in text


def test_the_page_has_a_section_a_model_and_the_terminal_fits(place: Path, results: dict[str, Comparison]) -> None:
    page = PageChecks((place / "out" / "report.html").read_text())
    assert page.problems == [] and page.tags.count("img") == 3
    assert [name for name, tag in page.ids.items() if tag == "section"] == ["models", "model-1", "model-2", "how"]
    assert page.texts["model-2-heading"] == "pieces"
    cells = list(results["both"].cells)
    bytes_table, pieces_table, over = overview("Which?", cells)
    assert (bytes_table.caption, pieces_table.caption) == ("bytes: Which?", "pieces: Which?")
    assert over.header == ("method", "asked", "mean of models", "bytes", "pieces") and len(over.rows) == 2


def cells_of(method: str, by_model: dict[str, tuple[float, ...]], ratio: float = 0.3) -> list[FoundCell]:
    """Cells with these perplexities, one a draw."""
    return [
        FoundCell(method, ratio, seed, ratio, 1.0, {"prose": math.log(each)}, {}, model=model)
        for model, perplexities in by_model.items()
        for seed, each in enumerate(perplexities)
    ]


def test_perplexities_of_different_tokenizers_are_never_averaged() -> None:
    dense = cells_of("dense", {"small": (10.0, 11.0), "large": (100.0, 110.0)}, 0.0)
    low = cells_of("low", {"small": (20.0, 22.0), "large": (110.0, 121.0)})  # 2 and 1.1 times dense
    even = cells_of("even", {"small": (15.0, 16.5), "large": (140.0, 154.0)})  # 1.5 and 1.4 times dense
    told = verdict(dense + low + even)
    start = "By perplexity over that of each model's own dense (geometric mean over domains and 2 models)"
    best = f"at 30% removed even has the lowest ({math.sqrt(1.5 * 1.4):.2f})"
    assert told == f"{start}, {best}; 4 draws do not tell it from low ({math.sqrt(2 * 1.1):.2f})."
    # Better on every draw of every model, by much more than gains differ.
    worse = cells_of("worse", {"small": (17.0, 19.0), "large": (160.0, 175.0)})
    assert told.partition(";")[0] in verdict(dense + even + worse) and "do not tell" not in verdict(
        dense + even + worse
    )


@pytest.mark.parametrize("model", [[], ["a", "a"], 3, ["a", 3]])
def test_models_are_different_names(place: Path, model: Any, tmp_path: Path) -> None:
    data = yaml.safe_load((place / "study.yaml").read_text())
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data | {"model": model}))
    with pytest.raises(
        RecipeError, match=r"study.yaml: model: must be a model, or a list of different ones, got .*\.$"
    ):
        load_study(str(tmp_path / "study.yaml"), small=False)


def test_names_in_tables_are_short_unless_two_are_alike(tmp_path: Path) -> None:
    for name in ("one/tiny", "two/tiny", "two/other"):
        (tmp_path / name).mkdir(parents=True)
    keys: dict[str, Any] = {"question": "?", "ratios": (0.2,), "seeds": (0,), "methods": {"ours": {}}}

    def names(*models: str) -> list[str]:
        return list(Study(model=models, **keys).by_name)

    one, two, other = (str(tmp_path / name) for name in ("one/tiny", "two/tiny", "two/other"))
    assert names(one, other, "Qwen/Qwen2.5-0.5B") == ["tiny", "other", "Qwen/Qwen2.5-0.5B"]
    assert names(one, two) == [one, two]
    assert Study(model=(one,), **keys).model == one


def test_a_dry_run_lists_each_model_and_a_mistake_names_its_model(place: Path, tmp_path: Path) -> None:
    study = str(place / "study.yaml")
    done = run_cli("compare", study, tmp_path / "out", "--dry-run", "--json")
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(each["model"], each["method"]) for each in found] == [
        (model, method) for model in TOKENIZERS for method in ("ours", "wanda")
    ]
    # Embedding and head of 320 x 48 and the last norm, in float32: of one round nothing else is put away.
    assert {each["disk_bytes"] for each in found} == {4 * (2 * 320 * 48 + 48)}
    done = run_cli(
        "compare", study, tmp_path / "out", "--dry-run", "--model", place / "pieces", "--model", place / "bytes"
    )
    assert re.findall(r"(\w+): Which\?", done.stdout) == ["pieces", "bytes"] and not (tmp_path / "out").exists()
    tiny_llama(num_layers=2, intermediate_size=8).save_pretrained(tmp_path / "narrow")
    done = run_cli("compare", study, tmp_path / "out", "--model", place / "bytes", "--model", tmp_path / "narrow")
    assert done.status == 2 and "study, model narrow, method 'ours' at 20%: " in done.stderr
    assert not (tmp_path / "out").exists()
