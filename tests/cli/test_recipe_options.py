"""What the command line says of a recipe: --set, options of their own, `secateur recipe`, how errors say it."""

import json
import re

import pytest
import yaml
from run_cli import run_cli

from secateur.cli.common import parse_domains, parse_sets, with_answers
from secateur.cli.prune import about, meaning
from secateur.plugins import default_domains, mixtures
from secateur.recipe import Recipe, RecoverySettings, parse_recipe, preset_texts


def test_the_default_text_is_beside_the_prompts_of_a_file(texts):
    keys = with_answers({}, str(texts["prose"]))["calibration"]
    assert keys["answers"] == 0.5
    assert keys["domains"].pop("answers") == {"files": [str(texts["prose"])], "answers": True}
    assert keys["domains"] == default_domains()
    column = with_answers({}, f"{texts['prose']}:question")["calibration"]["domains"]["answers"]
    assert column == {"files": [str(texts["prose"])], "column": "question", "answers": True}
    assert with_answers({"calibration": {"answers": 0.75}}, str(texts["prose"]))["calibration"]["answers"] == 0.75
    mixed = with_answers({"calibration": {"domains": "general"}}, str(texts["prose"]))["calibration"]["domains"]
    assert list(mixed) == [*mixtures()["general"], "answers"]


def test_answers_are_a_share_or_a_file(texts, tmp_path):
    asking = ("prune", "model", tmp_path / "out", "--answers")
    no_share = run_cli(*asking, "half")
    named_twice = run_cli(*asking, texts["prose"], "--domain", f"answers={texts['code']}")
    assert no_share.status == named_twice.status == 2
    assert "--answers half: is no share and no file; give a share from 0 to 1, or a file" in no_share.stderr
    assert "a domain of text is called 'answers'; call it by another name." in named_twice.stderr


def test_the_same_keys_for_inspect_and_recover(checkpoints, recipe_file):
    sets = ("--set", "remove.groups=[kv_heads]", "--set", "remove.align=1", "--set", "remove.share=0.05")
    options = ("--recipe", recipe_file, "--remove", 0.1)  # over which --set stands
    shown = run_cli("inspect", checkpoints["llama"], *options, "--json", *sets)
    assert shown.status == 0, shown.stderr
    told = json.loads(shown.stdout)
    assert [group["name"] for group in told["groups"]] == ["kv_heads"] and told["remove_asked"] == 0.05
    refused = run_cli("recover", "pruned", "--teacher", "dense", "--out", "o", "--set", "recover.batch_tokens=0")
    assert refused.status == 2 and refused.stderr.startswith("secateur: --set: recover.batch_tokens: ")


def test_values_of_set_are_yaml():
    assert parse_sets(["remove=0.3", "remove.align=8", "remove.layers=[1, -1]", "choose.score=", "a.b=x=y"]) == {
        "remove": {"share": 0.3, "align": 8, "layers": [1, -1]},
        "choose": {"score": None},
        "a": {"b": "x=y"},
    }
    assert parse_sets(None) == {}


def test_a_domain_is_a_file_or_a_column_of_it_or_its_name_or_those_of_a_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:name").write_text("")
    assert parse_domains(["a=rows.csv:question", "b=odd:name", "c=C:/x.txt", "d=plain.txt", "code"]) == {
        "a": {"files": ["rows.csv"], "column": "question"},
        "b": {"files": ["odd:name"]},
        "c": {"files": ["C:/x.txt"]},
        "d": {"files": ["plain.txt"]},
        "code": {"installed": "code"},
    }
    found = parse_domains(["general", "chat=chat.jsonl"])
    assert found == {**mixtures()["general"], "chat": {"files": ["chat.jsonl"]}}
    assert parse_domains(["general=mine.txt"]) == {"general": {"files": ["mine.txt"]}}


@pytest.mark.parametrize("preset", preset_texts())
def test_the_printed_recipe_is_the_preset(preset):
    shown = run_cli("recipe", preset)
    assert (shown.status, shown.stderr) == (0, "")
    assert parse_recipe(yaml.safe_load(shown.stdout)) == parse_recipe({"preset": preset})
    above, below = shown.stdout.split("# recover:")
    with_recovery = above + "\n".join(line.removeprefix("# ") for line in f"# recover:{below}".splitlines())
    assert parse_recipe(yaml.safe_load(with_recovery)).recover == RecoverySettings()


def test_a_size_or_layers_take_the_place_of_what_a_preset_says(checkpoints):
    for asked in ("--preset smallest --to 60K", "--preset quick --set remove.layers=[1]"):
        shown = run_cli("inspect", checkpoints["llama"], *asked.split(), "--json")
        assert shown.status == 0, shown.stderr
    twice = run_cli("inspect", checkpoints["llama"], "--set", "remove.layers=[1]", "--set", "remove.depth=2")
    assert twice.status == 2 and "remove.depth: 2 is not the number of remove.layers: [1]" in twice.stderr


def test_the_comments_of_the_recipe_are_the_docstrings():
    shown = " ".join(run_cli("recipe").stdout.replace("#", " ").split())
    for group in ("remove", "choose", "repair", "calibration", "machine", "output"):
        model: type = Recipe.model_fields[group].annotation  # type: ignore[assignment]
        assert f"{about(model)} {group}:" in shown
        meanings = {name: meaning(field) for name, field in model.model_fields.items() if name != "domains"}
        assert all(text and f"{text} " in shown and "None" not in text for text in meanings.values()), group
    assert "One of uniform, curve. budget: uniform" in shown and "One of ." not in shown
    assert run_cli("recipe", "bset").stderr.endswith("did you mean 'best'?\n")


def test_inspect_describes_the_model_but_for_what_no_share_can_mend(checkpoints, recipe_file):
    inspect = ("inspect", checkpoints["llama"], "--recipe", recipe_file)
    shown = run_cli(*inspect, "--remove", 0.9, "--json")
    assert shown.status == 0, shown.stderr
    told = json.loads(shown.stdout)
    assert told["remove_asked"] == 0.9 and told["remove_reached"] == pytest.approx(0.6114, abs=2e-3)
    [note] = [note for note in told["warnings"] if note.startswith("a run would be refused (remove: ")]
    assert "at most 0.6" in note
    found = re.search(r"shown is remove: (\S+)\.$", note)
    assert found is not None
    assert run_cli(*inspect, "--remove", found[1]).status == 0
    outcome = run_cli(*inspect, "--set", "remove.align=4096")
    assert outcome.status == 2 and "at most 0.000" in outcome.stderr and "lower align" in outcome.stderr


def test_version_order_and_completion(monkeypatch):
    shown = run_cli("--version")
    assert shown.status == 0 and re.fullmatch(r"secateur \d+\.\d+\.\d+\n", shown.stdout)
    listed = " ".join(re.findall(r"^│ ([a-z]+) ", run_cli("--help").stdout, re.MULTILINE))
    assert listed == "inspect recipe measure prune trim recover evaluate bench export push compare verify demo"
    monkeypatch.setenv("_SECATEUR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "secateur rec")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run_cli().stdout.split() == ["recipe", "recover"]
