"""`like`: another result's units go in a sibling, which is repaired anew; of the same model, the same bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_family
from models import saved, tiny_llama, tiny_qwen2
from recipes import grouped
from run_cli import run_cli
from safetensors.torch import load_file
from stops import Stopped, lines_of, stopped_after, weights

import secateur
from secateur.errors import CheckpointError
from secateur.model.checkpoint import open_checkpoint
from secateur.model.identity import identity
from secateur.report.records import read_result, read_summary
from secateur.vocabulary.kept import kept_tokens_of
from tests.vocabulary.test_tokenizer import NUM_PADDING, made

OWN_WIDTHS = {"groups": ["ffn", "kv_heads"], "budget": "curve", "protected_layers": [0]}
RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {"polish": {"num_tokens": 640}},
    "heads and layers of their own widths, by the worst domain": {**OWN_WIDTHS, "domain_weighting": "minimax"},
    "experts": {"groups": ["experts"], "align": 1},
    "channels inside experts": {"groups": ["expert_ffn"]},
    "tokens and layers": {"vocabulary": 448, "depth": 1, "remove": 0.5},
    "tokens alone": {"vocabulary": 448, "groups": []},
}


pytestmark = pytest.mark.usefixtures("unproved")


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """Models by the first word of a recipe's name; `sibling`: the llama with other weights."""
    place, (tokenizer, _) = tmp_path_factory.mktemp("models"), made("byte-level")
    mixtral = saved(place / "mixtral", tiny_family("mixtral"))
    llama = tiny_llama(tied=True, vocab_size=len(tokenizer) + NUM_PADDING)
    tokens, sibling = saved(place / "tokens", llama, tokenizer), saved(place / "sibling", tiny_llama(seed=1))
    found = {"experts": mixtral, "channels": mixtral, "tokens": tokens, "sibling": sibling}
    return found | {"llama": checkpoints["llama"]}


@pytest.fixture(scope="module")
def result(models, recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("result") / "out"
    secateur.prune(models["llama"], grouped({**recipe, "remove": 0.3, "rounds": 3}), out=out)
    return out


@pytest.fixture(scope="module")
def replayed(models, result, tmp_path_factory) -> Path:
    """A sibling less the units of that result."""
    out = tmp_path_factory.mktemp("replayed") / "out"
    secateur.prune(models["sibling"], like=result, out=out)
    return out


@pytest.fixture(scope="module")
def trimmed(models, recipe, tmp_path_factory) -> Path:
    """A result that has lost tokens."""
    out = tmp_path_factory.mktemp("trimmed") / "out"
    secateur.prune(models["tokens"], grouped({**recipe, "vocabulary": 448, "remove": 0.3}), out=out)
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_model_gives_the_same_bytes(name, models, recipe, tmp_path, monkeypatch):
    model = models.get(name.split()[0], models["llama"])
    first, again = tmp_path / "first", tmp_path / "again"
    secateur.prune(model, grouped({**recipe, "remove": 0.2, **RECIPES[name]}), out=first)
    monkeypatch.setattr("secateur.pruning.loop.curve_plan", None)  # widths are not measured again
    found = secateur.prune(model, like=first, out=again)
    before, after = weights(first), weights(again)
    assert before.pop("recipe.yaml") and after.pop("recipe.yaml")
    assert len(before) == 3 and after == before
    for file in ("tokenizer.json", "tokens.json"):
        assert (first / file).is_file() == (again / file).is_file()
        assert not (first / file).is_file() or (first / file).read_bytes() == (again / file).read_bytes()
    one, two = read_summary(first), read_summary(again)
    assert one.pruned_losses == two.pruned_losses and one.widths == two.widths
    # The recipe stays, but for the names of the layers that go.
    assert read_result(first).recipe.filled(remove={"layers": found.recipe.remove.layers}) == found.recipe


def test_a_sibling_loses_the_same_units_at_once_and_is_refitted_on_itself(models, result, replayed, recipe, tmp_path):
    out, cut = replayed, tmp_path / "cut"
    secateur.prune(models["sibling"], {"repair": {"compensate": "none"}}, like=result, out=cut)
    chosen = secateur.prune(models["sibling"], grouped({**recipe, "remove": 0.3})).keeps
    entries = json.loads((result / "keep.json").read_text())
    assert (out / "keep.json").read_bytes() == (cut / "keep.json").read_bytes() == (result / "keep.json").read_bytes()
    dense, refitted, kept = (load_file(each / "model.safetensors") for each in (models["sibling"], out, cut))
    for entry in entries:
        keep, mlp = entry["keep"], f"model.layers.{entry['layer']}.mlp."
        assert keep != chosen[entry["layer"], "ffn"].tolist()  # or this would prove nothing
        for each in (refitted, kept):
            assert torch.equal(each[mlp + "up_proj.weight"], dense[mlp + "up_proj.weight"][keep])
        reader = dense[mlp + "down_proj.weight"][:, keep]
        assert torch.equal(kept[mlp + "down_proj.weight"], reader)
        assert (refitted[mlp + "down_proj.weight"] - reader).norm() > 0.05 * reader.norm()
    steps = lines_of(out, "group")
    assert {step["round"] for step in steps} == {1} and read_result(out).recipe.choose.rounds == 1
    assert all(step["step"] and step["error_before"] and step["error_after"] for step in steps)
    for step in steps:
        assert all(step["error_after"][name] < before for name, before in step["error_before"].items())
    summary = read_summary(out)
    assert summary.like is not None and summary.like.name == "out"
    assert summary.like.fingerprint == identity(open_checkpoint(result))
    assert summary.lineage[-1].name == "sibling"
    assert "units: those that went in out, not chosen anew; refitted on this model." in summary.warnings


@pytest.mark.parametrize("group", ["experts", "expert_ffn"])
def test_experts_of_a_sibling_are_the_same(group, models, recipe, tmp_path):
    asked = grouped({**recipe, "remove": 0.2, "align": 1, "groups": [group], "output": {"evaluate": False}})
    sibling = tiny_family("mixtral")
    with torch.no_grad():
        for parameter in sibling.parameters():
            parameter.copy_(parameter.roll(1, 0))
    first, again, place = tmp_path / "first", tmp_path / "again", saved(tmp_path / "sibling", sibling)
    secateur.prune(models["experts"], asked, out=first)
    found = secateur.prune(place, like=first, out=again).keeps
    chosen = secateur.prune(place, asked).keeps
    assert (again / "keep.json").read_bytes() == (first / "keep.json").read_bytes()
    assert any(not torch.equal(found[key], chosen[key]) for key in chosen)  # or this would prove nothing
    assert all(step["step"] is not None for step in lines_of(again, "group"))


def test_it_resumes_and_not_by_another_result(models, result, replayed, tmp_path):
    out, other = tmp_path / "out", Path(shutil.copytree(result, tmp_path / "other"))
    entries = json.loads((other / "keep.json").read_text())
    entries[0]["keep"] = list(range(len(entries[0]["keep"])))
    (other / "keep.json").write_text(json.dumps(entries))
    with pytest.raises(Stopped), stopped_after(3):
        secateur.prune(models["sibling"], like=result, out=out)
    with pytest.raises(CheckpointError, match="had other inputs: computes units that stay has changed"):
        secateur.prune(models["sibling"], like=other, out=out)
    told: list[str] = []
    secateur.prune(models["sibling"], like=result, out=out, tell=told.append)
    assert any("goes on from the" in line for line in told)
    assert weights(out) == weights(replayed)


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (tiny_qwen2, {}, "the family of {} is qwen2, and of the model that was pruned there llama"),
        (tiny_llama, {"num_layers": 4}, "the number of layers of {} is 4, and of the model .* there 3"),
        (tiny_llama, {"hidden_size": 64}, "the hidden size of {} is 64, and of the model .* there 48"),
        (tiny_llama, {"intermediate_size": 128}, "the number of ffn units in a layer of {} is 128, .* there 112"),
        (tiny_llama, {"num_key_value_heads": 4}, "the number of parameters without those of tokens of {} is "),
    ],
)
def test_another_shape_is_refused_by_its_first_difference(make, changes, said, result, tmp_path):
    place = saved(tmp_path / "model", make(**changes))
    with pytest.raises(CheckpointError, match=said.format(place) + ".*; give a model of that shape"):
        secateur.prune(place, like=result)


def test_more_tokens_are_no_other_shape_unless_tokens_went(result, trimmed, tmp_path):
    place = saved(tmp_path / "model", tiny_llama(vocab_size=352))
    assert secateur.prune(place, like=result).keeps.keys() == {(layer, "ffn") for layer in range(3)}
    tokenizer, _ = made("byte-level")
    more = saved(tmp_path / "more", tiny_llama(tied=True, vocab_size=len(tokenizer) + NUM_PADDING + 8), tokenizer)
    with pytest.raises(CheckpointError, match="the number of tokens of "):
        secateur.prune(more, like=trimmed)


def test_other_tokens_under_the_same_numbers_are_refused(models, trimmed, tmp_path):
    other = Path(shutil.copytree(models["tokens"], tmp_path / "sibling"))
    said = json.loads((trimmed / "tokenizer.json").read_text())["added_tokens"][0]["content"]
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (other / file).is_file():
            (other / file).write_text((other / file).read_text().replace(json.dumps(said), '"<|renamed|>"'))
    refused = r"token '.*' is not the same in the tokenizer of .*leave like out"
    with pytest.raises(CheckpointError, match=refused):
        secateur.prune(other, like=trimmed)
    # Two that need not stay, under each other's numbers.
    kept, data = kept_tokens_of(trimmed), json.loads((models["tokens"] / "tokenizer.json").read_text())
    assert kept is not None
    first, second = [index for index in kept.dense_ids if index not in made("byte-level")[1].fixed][:2]
    numbers = {first: second, second: first}
    data["model"]["vocab"] = {text: numbers.get(index, index) for text, index in data["model"]["vocab"].items()}
    shutil.copytree(models["tokens"], other, dirs_exist_ok=True)
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=refused):
        secateur.prune(other, like=trimmed)


def test_options_on_top_are_those_that_choose_nothing(models, result, texts, tmp_path):
    command = "prune", models["sibling"], tmp_path / "out", "--like", result
    run = run_cli(*command, "--remove", "0.25")
    assert run.status == 2 and f"remove.share: is 0.3 in the run that like {result} repeats, got 0.25" in run.stderr
    assert run_cli(*command, "--set", "choose.rounds=2").stderr.count("choose.rounds: is 3 in the run") == 1
    same = ("--remove", "0.3", "--domain", f"other={texts['code']}", "--set", "repair.damping=0.01")
    run = run_cli(*command, *same)
    assert run.status == 0, run.stderr
    recipe = read_result(tmp_path / "out").recipe
    assert list(recipe.calibration.domains) == ["other"] and recipe.repair.damping == 0.01
    assert recipe.calibration.num_tokens == 1280
    run = run_cli("prune", models["sibling"], tmp_path / "no", "--like", models["llama"])
    assert run.status == 2 and "give a directory that secateur prune has written" in run.stderr


@pytest.mark.parametrize("keeps", ["{", [1], *([{"layer": 0, "group": "ffn", "keep": [0, each]}] for each in (0, 999))])
def test_damaged_units_are_one_sentence(keeps, models, result, tmp_path):
    other = Path(shutil.copytree(result, tmp_path / "other"))
    (other / "keep.json").write_text(keeps if keeps == "{" else json.dumps(keeps))
    with pytest.raises(CheckpointError, match=r"keep\.json: does not name units that stay"):
        secateur.prune(models["sibling"], like=other)
