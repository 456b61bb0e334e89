"""Proposed specs: they pass the table of families for every family that is known, and are never used by themselves."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.model.checkpoint import meta_model
from secateur.model.spec import ArchSpec, find_spec
from tests.families import FAMILIES, tiny_family
from tests.model.test_families import (
    test_cut_saved_and_reloaded_by_stock_transformers_equals_mask as check_cut,
)
from tests.model.test_families import test_permuting_units_changes_nothing as check_permutation
from tests.run_cli import run_cli
from tests.warm import WarmProcesses

# A family of each kind: plain, fused, biases and Conv1D, shared experts, latent attention, several models in one.
KINDS = ("llama", "phi3", "gpt2", "qwen2_moe", "deepseek_v2", "gemma3_multimodal")
TOOL = Path(__file__).parents[1] / "tools" / "propose.py"


def loaded_tool() -> Any:
    spec = spec_from_file_location("propose", TOOL)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


spec_text = loaded_tool().spec_text


def proposal(name: str) -> ArchSpec:
    return ArchSpec.model_validate(yaml.safe_load(spec_text(meta_model(tiny_family(name).config))))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_proposed_for_a_known_family_holds(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    family, spec = find_spec(FAMILIES[name][0])
    proposed = proposal(name)
    assert (proposed.layers, proposed.head) == (spec.layers, spec.head)
    assert set(proposed.groups) <= set(spec.groups), "a group that the family cannot have"
    assert (proposed.experts is None) == (spec.experts is None)
    monkeypatch.setattr("secateur.model.bind.find_spec", lambda model_type: (family, proposed))
    for group in proposed.groups:
        check_permutation(name, group)
        check_cut(name, group, tmp_path / group)


def test_most_groups_of_dense_families_are_found() -> None:
    missing = {
        (name, group)
        for name, (model_type, _) in FAMILIES.items()
        for group in set(find_spec(model_type)[1].groups) - {"query_heads", "shared"}
        if find_spec(model_type)[1].experts is None and group not in proposal(name).groups
    }
    assert missing == {("gpt2-derived-width", "ffn")}  # whose config says no width


def test_the_tool_prints_a_proposal_for_a_family_that_inspect_and_prune_refuse(
    tmp_path: Path, warm: WarmProcesses
) -> None:
    model = tiny_family("nemotron")
    model.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"nemotron"', '"arcee"').replace("Nemotron", "Arcee"))
    shown = warm.run([sys.executable, TOOL, tmp_path / "model"], env=dict(os.environ))
    assert shown.returncode == 0, shown.stderr
    spec = ArchSpec.model_validate(yaml.safe_load(shown.stdout))
    assert spec.model_types == ("arcee",) and set(spec.groups) == {"kv_heads", "ffn"}
    for arguments in (("inspect", tmp_path / "model"), ("prune", tmp_path / "model", tmp_path / "out")):
        refused = run_cli(*arguments)
        assert refused.status == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
        assert "model family 'arcee' is not supported" in refused.stderr
        assert "docs/extend.md says how to add one" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_the_tests_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    text = spec_text(meta_model(tiny_family("phi3").config)).replace("[1, 1]", "[2]")
    wrong = ArchSpec.model_validate(yaml.safe_load(text))
    monkeypatch.setattr("secateur.model.bind.find_spec", lambda model_type: ("phi3", wrong))
    with pytest.raises(AssertionError, match="not close"):
        check_permutation("phi3", "ffn")
