"""The recipe's keys: as docs/recipe.md tells them, limits, merging, and one sentence per mistake."""

import math
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
import yaml

from secateur.errors import RecipeError
from secateur.recipe import Recipe, as_recipe, dump_recipe, load_recipe, merged, parse_recipe

TOOL = Path(__file__).parents[1] / "tools" / "recipe_page.py"


def test_the_page_of_the_recipe_is_what_the_schema_says():
    tool = SimpleNamespace(**run_path(str(TOOL)))
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run python tools/recipe_page.py"
    assert not [line for line in tool.tables().splitlines() if line.endswith("|  |")], "a key without a docstring"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("remove: {share: 0}", r"^recipe: remove\.share: .*greater than 0, got 0\.$"),
        ("remove: 1", r"^recipe: remove\.share: .*less than 1, got 1\.$"),
        ("remove: .nan", r"remove\.share: .*finite number, got nan\.$"),
        ("remove: .inf", r"remove\.share: .*, got inf\.$"),
        ("remove: {groups: []}", r"remove: groups is empty and vocabulary is not given, .*; name a group"),
        ("remove: {vocabulary: many}", r"remove\.vocabulary: must be auto, or how many tokens stay, a multiple of 64"),
        ("remove: {depth: -1}", r"remove\.depth: .*greater than or equal to 0"),
        ("remove: {align: 0}", r"remove\.align: .*greater than or equal to 1"),
        ("choose: {rounds: 0}", r"choose\.rounds: "),
        ("choose: {score: obss}", r"unknown choose\.score 'obss'; allowed: random, .*did you mean 'obs'\?"),
        ("repair: {damping: .inf}", r"repair\.damping: .*finite"),
        ("repair: {damping: 0}", r"repair\.damping: .*greater than 0"),
        ("repair: {target_mix: 1.01}", r"repair\.target_mix: .*less than or equal to 1"),
        ("calibration: {sequence_length: 7}", r"calibration\.sequence_length: .*greater than or equal to 8"),
        ("calibration: {domains: {}}", r"calibration\.domains: "),
        ("calibration: {domains: {a: {}}}", r"calibration\.domains\.a: needs exactly one of .*; got none"),
        ("calibration: {domains: {a: {files: x, installed: code}}}", r"got installed and files"),
        ("calibration: {domains: {a: {file: x}}}", r"'calibration\.domains\.a\.file'; did you mean 'files'"),
        ("recover: {kl_share: 1.5}", r"recover\.kl_share: "),
        ("polish: {num_tokens: -1}", r"polish\.num_tokens: .*greater than or equal to 0, got -1\.$"),
        ("polish: much", r"polish: must be default, false or a mapping of its keys, got 'much'\.$"),
        ("polish: {held_out_blocks: 3}", r"unknown key 'polish\.held_out_blocks'"),
        ("seed: -1", r"seed: "),
        ("ouput: {}", r"unknown key 'ouput'; did you mean 'output'\?"),
        ("preset: bset", r"unknown preset 'bset'; allowed: best, .*; did you mean 'best'\?"),
        ("preset: [best]", r"unknown preset '\['best'\]'; allowed: best, "),
        ("remove: [0.2]", r"remove"),
        ("[1, 2]", r"a recipe is a mapping of keys to values, got list\.$"),
        ("calibration: {domains: {a: {answers: true, share: 0}}}", r"share: .*greater than 0"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(yaml.safe_load(text))
    assert "\n" not in str(caught.value)


def test_bounds_are_allowed_where_the_text_says_so():
    edge = {"remove": {"depth": 0}, "repair": {"target_mix": 1}, "calibration": {"sequence_length": 8}}
    found = parse_recipe({**edge, "recover": {"kl_share": 0}})
    assert (found.remove.depth, found.repair.target_mix, found.calibration.sequence_length) == (0, 1, 8)
    assert found.recover is not None and found.recover.kl_share == 0
    # No polish and its defaults are a word each.
    assert parse_recipe({"polish": False}).polish.num_tokens == 0
    assert parse_recipe({"polish": "default"}).polish == parse_recipe({}).polish


def test_a_number_is_the_share_also_where_one_is_merged_over_the_other():
    assert parse_recipe({"remove": 0.4}) == parse_recipe({"remove": {"share": 0.4}})
    assert merged({"remove": 0.2}, {"remove": {"align": 64}}) == {"remove": {"share": 0.2, "align": 64}}
    assert merged({"remove": {"align": 64}}, {"remove": 0.2}) == {"remove": {"align": 64, "share": 0.2}}
    assert merged({"remove": 0.2}, {"remove": 0.3}) == {"remove": 0.3}
    base = {"a": {"b": 1, "c": [1]}, "d": 1}
    assert merged(base, {"a": {"c": [2]}, "e": 3}) == {"a": {"b": 1, "c": [2]}, "d": 1, "e": 3}
    assert base == {"a": {"b": 1, "c": [1]}, "d": 1}, "neither of the two is changed"
    assert merged({"a": {"b": 1}}, {"a": 2}) == {"a": 2}


def test_what_is_written_is_read_back_the_same(tmp_path):
    domains = {"a": {"files": "x.txt", "share": 2}, "b": {"answers": True, "protect": 0.1}}
    asked = {"remove": {"share": 0.35, "groups": ["ffn", "kv_heads"], "layers": [1, -2]}, "recover": {"num_tokens": 99}}
    asked |= {"choose": {"rounds": 2, "budget": "curve"}, "calibration": {"domains": domains}}
    recipe = parse_recipe(asked)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert as_recipe(tmp_path / "recipe.yaml") == as_recipe(str(tmp_path / "recipe.yaml")) == recipe
    assert as_recipe(recipe) is recipe and as_recipe(None) == Recipe() and as_recipe(asked) == recipe
    assert recipe.calibration.domains["a"].source == ("files", ("x.txt",))
    assert recipe.calibration.domains["b"].source == ("answers", True)
    with pytest.raises(ValueError, match="frozen"):
        recipe.calibration.domains["b"].share = math.pi  # type: ignore[misc]


def test_files_that_are_no_recipes(tmp_path):
    file = tmp_path / "r.yaml"
    for content, message in ((b"\xff", "give a YAML file in UTF-8"), (b"a: [", "cannot be read"), (b"- 1", "got list")):
        file.write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            load_recipe(file)
    file.write_bytes(b"")
    assert load_recipe(file) == {}
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_presets_lie_below_what_is_asked():
    assert parse_recipe({"preset": "default"}) == Recipe()
    best = parse_recipe({"preset": "best", "repair": {"damping": 0.5}})
    assert best.choose.budget == "curve" and best.repair.damping == 0.5
    assert best.remove.vocabulary == "auto" and best.remove.share == 0.2
    smallest = parse_recipe({"preset": "smallest"})
    assert smallest == best.filled(remove={"share": 0.5}, repair={"damping": 0.001})
    assert parse_recipe({"preset": "best", "remove": {"vocabulary": None}}).remove.vocabulary is None
    quick = parse_recipe({"preset": "quick", "remove": 0.3})
    assert (quick.remove.share, quick.remove.depth, quick.choose.score, quick.output.evaluate) == (0.3, 0, "wanda", 512)
    # What says the same otherwise replaces the key below.
    assert merged({"remove": {"to": "60M", "align": 8}}, {"remove": 0.2}) == {"remove": {"share": 0.2, "align": 8}}
    assert parse_recipe({"preset": "smallest", "remove": {"to": "60M"}}).remove.to == "60M"
    assert parse_recipe({"preset": "quick", "remove": {"layers": [4]}}).remove.depth is None


def test_a_written_recipe_says_every_default_and_names_files_whole_unless_it_is_for_others():
    """A later version with other defaults must repeat the run."""
    written = yaml.safe_load(dump_recipe(Recipe()))
    assert written["repair"]["damping"] == 0.001 and written["choose"]["budget"] == "uniform"
    assert list(written) == ["seed", "remove", "choose", "repair", "calibration", "machine", "output", "polish"]
    recipe = Recipe(calibration={"domains": {"mine": {"files": ["/home/me/a.txt"]}}})
    assert "- /home/me/a.txt" in dump_recipe(recipe)
    assert "- a.txt" in dump_recipe(recipe, places=False) and "/home" not in dump_recipe(recipe, places=False)
