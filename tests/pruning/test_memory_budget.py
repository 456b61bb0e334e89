"""A memory budget: weights that do not fit stay on disk; the result is the same to the byte; the impossible says so."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import grouped
from run_cli import run_cli

import secateur
from secateur.errors import RecipeError
from secateur.model.checkpoint import load_model, open_checkpoint
from secateur.pruning.inspect import inspect
from secateur.recipe import parse_recipe


def budget_between(model: Path, recipe: dict[str, Any]) -> str:
    """Return a budget that weights in memory exceed and weights on disk do not."""
    whole = inspect(model, parse_recipe(grouped(recipe))).memory
    return f"{(whole.peak - 1) / 1000:.3f}KB"


@pytest.mark.parametrize(
    ("name", "changes"),
    [("qwen2-tied", {}), ("llama", {"budget": "curve", "groups": ["ffn", "kv_heads"], "rounds": 2, "depth": 1})],
    ids=["defaults", "rounds and depth"],
)
def test_weights_on_disk_give_the_same_bytes(name, changes, checkpoints, recipe, tmp_path):
    asked = {**recipe, "remove": 0.35, **changes}
    whole = secateur.prune(checkpoints[name], grouped(asked), out=tmp_path / "whole")
    streamed = {**asked, "memory_budget": budget_between(checkpoints[name], asked)}
    assert inspect(checkpoints[name], parse_recipe(grouped(streamed))).weights_on_disk
    found = secateur.prune(checkpoints[name], grouped(streamed), out=tmp_path / "streamed")
    for file in ("model.safetensors", "config.json", "keep.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "streamed" / file).read_bytes(), file
    assert found.summary.pruned_losses == whole.summary.pruned_losses
    # Each token of an answer would read all weights from the disk again.
    assert whole.summary.own_answers is not None and found.summary.own_answers is None


def test_mapped_weights_are_those_in_the_files_and_the_files_stay(checkpoints):
    file = checkpoints["llama"] / "model.safetensors"
    before = file.read_bytes()
    mapped, read = (load_model(open_checkpoint(checkpoints["llama"]), mapped=each) for each in (True, False))
    for (name, ours), theirs in zip(mapped.state_dict().items(), read.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    with torch.no_grad():
        mapped.model.layers[0].mlp.down_proj.weight.zero_()
    assert file.read_bytes() == before


def test_a_budget_that_cannot_work_names_the_least_that_can(checkpoints, recipe_file, recipe, tmp_path):
    options = ("--recipe", recipe_file, "--set", "machine.memory_budget=1KB")
    done = run_cli("prune", checkpoints["llama"], tmp_path / "out", *options)
    assert done.status == 2 and not (tmp_path / "out").exists()
    said = r"memory_budget: 1.0 kB cannot work; with all weights on disk the run still needs (.+) [kM]B"
    told = re.search(said, done.stderr)
    assert told and float(told[1]) > 1
    with pytest.raises(secateur.SecateurError, match=r"machine\.memory_budget: must be a number and KB, MB, GB or TB"):
        secateur.prune(checkpoints["llama"], grouped({**recipe, "memory_budget": "lots"}))


def test_a_model_on_disk_answers_nothing_and_says_so(checkpoints, recipe, monkeypatch):
    monkeypatch.setattr("secateur.plugins.general_text", lambda kind: None)
    text = {key: value for key, value in recipe["calibration"].items() if key != "domains"}
    asked = {**recipe, "calibration": text, "remove": 0.35, "evaluate": False}
    asked["memory_budget"] = budget_between(checkpoints["llama"], asked)
    found = secateur.prune(checkpoints["llama"], grouped(asked))
    assert list(found.summary.calibration.num_tokens) == ["code", "mathematics", "science"]
    assert sum("it answers nothing" in note for note in found.summary.warnings) == 1
    text["domains"] = {"code": {"installed": "code"}, "mine": {"files": "prompts.jsonl", "answers": True}}
    with pytest.raises(RecipeError, match=r"domains\.mine: the model's weights are not all in memory"):
        secateur.prune(checkpoints["llama"], grouped(asked))
