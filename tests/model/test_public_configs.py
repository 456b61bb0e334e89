"""`inspect` on the configs of well-known checkpoints, 0.1B to 671B: it says what they are known to have.

Each file of `public_configs/` holds what the model's config says of its sizes and the total number of parameters that
its publisher or the hub states, and where both were found; tied embeddings count once.
"""

import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from recipes import grouped
from shown import assert_shown

from secateur.errors import RecipeError
from secateur.formats.gguf_tensors import gguf_specs
from secateur.model.bind import bind, decoder_layers
from secateur.model.per_layer import record_widths
from secateur.pruning.inspect import inspect
from secateur.recipe import parse_recipe
from secateur.report.records import Inspection
from tests.families import FAMILIES, GROUPS, tiny_family
from tests.model.test_families import cut_units, kept_of
from tests.model.test_twin import CONFIGS, config_of


@cache
def inspected(file: Path) -> tuple[Inspection, dict]:
    with tempfile.TemporaryDirectory() as directory:
        config_of(file).save_pretrained(directory)
        return inspect(directory, parse_recipe(grouped(dict(remove=0.1)))), json.loads(file.read_text())


def named(name: str) -> Path:
    return next(file for file in CONFIGS if file.stem == name)


# The others run with the slow tests.
QUICK = """smollm2-135m gemma-3-4b phi-2 gpt2 falcon-7b command-r7b exaone-4.0-32b mixtral-8x7b gpt-oss-20b
    deepseek-v3""".split()


# By model type; the rest of the public configs hold what llama.cpp takes for granted.
NOT_IN_LLAMA_CPP = {"exaone4": "takes sliding_window to be None, the config says 4096"}


@pytest.mark.parametrize(
    "name", [pytest.param(file.stem, marks=() if file.stem in QUICK else pytest.mark.slow) for file in CONFIGS]
)
def test_inspect_knows_the_parameters_the_groups_and_what_llama_cpp_takes(name: str) -> None:
    found, facts = inspected(named(name))
    assert found.size.num_params == pytest.approx(facts["num_params"], rel=0.005)
    model_type = facts["config"]["model_type"]
    assert found.family == model_type
    known = {group for name, (row, _) in FAMILIES.items() if row == model_type for group in GROUPS[name]}
    assert {group.name for group in found.possible} | set(found.impossible) >= known - {"ffn"}
    assert all(0 < group.num_params < found.size.num_params for group in found.possible)
    assert found.remove_reached == pytest.approx(0.1, abs=0.03)  # an eighth of the experts in Mixtral
    unknown = None if model_type in gguf_specs() else f"not '{model_type}'"
    problem = NOT_IN_LLAMA_CPP.get(model_type, unknown)
    assert bool(found.files) == (problem is None) and (problem or "") in (found.files_problem or "")


@pytest.mark.parametrize(
    ("name", "recipe", "problem"),
    [
        ("llama-3.2-1b", {"groups": ("kv_heads",), "remove": 0.05}, None),
        (
            "qwen2.5-7b",
            {"groups": ("kv_heads",), "remove": 0.05},
            "needs query heads \\* head_dim to be the hidden size",
        ),
        ("qwen2.5-0.5b", {"protected_layers": (0,)}, None),
        ("gemma-2-2b", {"protected_layers": (0,)}, "different widths, which llama.cpp runs of the families"),
        ("qwen3-8b", {"protected_layers": (0,)}, "openelm takes tie_word_embeddings to be True"),
    ],
)
def test_what_llama_cpp_runs_once_a_recipe_has_cut(
    name: str, recipe: dict[str, Any], problem: str | None, tmp_path: Path
) -> None:
    config_of(named(name)).save_pretrained(tmp_path)
    found = inspect(tmp_path, parse_recipe(grouped(dict(**{"remove": 0.1} | recipe))))
    assert bool(found.files) == (problem is None) and re.search(problem or "^$", found.files_problem or "")


def test_a_budget_in_which_nothing_works_names_what_needs_how_much(tmp_path: Path) -> None:
    """With weights on disk: hidden states, Gram matrices and a solve of 8192 channels; or the choice of layers."""
    config_of(named("llama-3.2-1b")).save_pretrained(tmp_path)
    told = []
    for changes in ({"remove": 0.1}, {"remove": 0.5}):
        with pytest.raises(RecipeError) as refused:
            inspect(tmp_path, parse_recipe(grouped(changes | {"memory_budget": "500MB"})))
        told.append(str(refused.value))
    assert_shown("budget", "\n".join(told))


def test_layers_that_differ_already_are_told_from_what_a_run_would_do(tmp_path: Path) -> None:
    model = tiny_family("llama")
    arch = bind(model)
    for group in (found for found in arch.select(("kv_heads", "ffn")) if found.layer == 1):
        cut_units(decoder_layers(model, arch)[1], group, kept_of(group, 0.5))
    record_widths(model, arch)
    model.save_pretrained(tmp_path)
    found = inspect(tmp_path, parse_recipe(grouped(dict(remove=0.05, align=8))))
    assert found.files and found.files_problem is None
