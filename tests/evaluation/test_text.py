"""What a model is judged on: the run's own held-out text, with a note if it is not that; figures that are none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import grouped
from texts import split_text
from tiny_tokenizer import tiny_tokenizer

from secateur.errors import RecipeError
from secateur.evaluation.text import recipe_blocks
from secateur.log import silent
from secateur.recipe import parse_recipe
from secateur.report.records import CalibrationFacts
from tests.report.test_shown import BARE

TOKENIZER = tiny_tokenizer()


def result_of(directory: Path, recipe: dict[str, Any], judged_hash: str | None, **changes: Any) -> Path:
    """Return a directory with a recipe and, unless the hash is None, a result.json that has it."""
    directory.mkdir(exist_ok=True)
    (directory / "recipe.yaml").write_text(
        yaml.safe_dump(grouped({**recipe, **changes}), sort_keys=False), encoding="utf-8"
    )
    if judged_hash is not None:
        text = CalibrationFacts("0", 32, {"prose": 640}, {"prose": 64}, {"prose": 1.0}, {"prose": 64}, judged_hash, {})
        (directory / "result.json").write_text(replace(BARE, calibration=text).to_json(), encoding="utf-8")
    return directory


@pytest.fixture
def drawn(recipe) -> Any:
    asked = parse_recipe(grouped({**recipe, "seed": 3, "rounds": 2}))
    assert asked.calibration.num_tokens is not None
    return split_text(asked.calibration, asked.calibration.num_tokens, TOKENIZER, 3, silent).judged


def test_text_that_is_not_the_runs_is_noted(recipe, drawn, tmp_path):
    out = result_of(tmp_path / "out", recipe, "0" * 64, seed=3, rounds=2)
    (note,) = recipe_blocks(out, TOKENIZER, silent)[1]
    assert f"sha256 {drawn.content_hash[:16]}, then {'0' * 16})" in note and "may have been calibrated" in note
    (out / "result.json").unlink()
    (note,) = recipe_blocks(out, TOKENIZER, silent)[1]
    assert note.startswith(f"{out / 'result.json'} is missing, so it is not known")


def test_text_that_the_dense_model_wrote_is_left_out(recipe, tmp_path):
    domains = {**recipe["calibration"]["domains"], "own": {"answers": True}}
    changed = {"calibration": {**recipe["calibration"], "domains": domains}}
    blocks, notes = recipe_blocks(result_of(tmp_path / "out", recipe, "0" * 64, **changed), TOKENIZER, silent)
    assert list(blocks) == ["prose", "code"]
    assert notes == ("answers of the dense model are left out (own), and so the hash of the text is not compared.",)


def test_a_directory_that_does_not_say_its_text_is_an_error(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"has no recipe\.yaml, so its held-out text is unknown"):
        recipe_blocks(tmp_path, TOKENIZER, silent)
    calibration = {**recipe["calibration"], "num_tokens": None}
    out = result_of(tmp_path / "out", recipe, None, calibration=calibration)
    with pytest.raises(RecipeError, match=r"calibration\.num_tokens is missing"):
        recipe_blocks(out, TOKENIZER, silent)
