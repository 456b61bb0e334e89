"""What a notebook meets: names, one-sentence errors, results as a line and as tables, bars."""

import dataclasses
import inspect
import json
import re
from typing import Any

import pytest
from page_checks import PageChecks
from recipes import grouped

import secateur
from secateur.evaluation.study import Comparison
from secateur.recipe import Remove, Strict, parse_recipe
from tests.report.test_card import recovery
from tests.report.test_shown import BENCH, CELLS, INSPECTION


@pytest.fixture(scope="module")
def shown(checkpoints, recipe, texts, tmp_path_factory) -> dict[str, Any]:
    """A result of every kind, on domains with names that mean harm."""
    folder = tmp_path_factory.mktemp("rows")
    lines = texts["code"].read_text(encoding="utf-8").splitlines()
    rows = [{"text": "\n".join(lines[at : at + 3])} for at in range(0, len(lines), 3)] + [{"text": None}] * len(lines)
    (folder / "code.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    domains = {HOSTILE: {"files": [str(texts["prose"])]}, "code": {"files": [str(folder)]}}
    keys = grouped({**recipe, "calibration": {**recipe["calibration"], "domains": domains}})
    dense, out = checkpoints["llama"], tmp_path_factory.mktemp("shown") / "result"
    pruned = secateur.prune(dense, keys, out=out)
    compared = Comparison((*CELLS, dataclasses.replace(CELLS[-1], method=HOSTILE)), {})
    found = {"prune": pruned, "summary": pruned.summary, "evaluate": secateur.evaluate(out, dense)}
    return found | {"inspect": INSPECTION, "bench": BENCH, "recover": recovery(HOSTILE), "compare": compared}


HOSTILE = "<script>alert(1)</script>"
KINDS = ("prune", "summary", "inspect", "evaluate", "bench", "recover", "compare")


def drawn(result: Any) -> str:
    """What Jupyter shows of the result's tables."""
    return secateur.table(result)._repr_mimebundle_(["text/html"], [])["text/html"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_a_line_and_its_tables_stand_on_their_own_and_are_escaped(kind, shown):
    line = repr(shown[kind])
    assert line.startswith(f"<{type(shown[kind]).__name__}") and "secateur.table" in line
    assert "\n" not in line and len(line) < 400
    page = PageChecks(html := drawn(shown[kind]))
    assert page.problems == [] and page.loads == [] and set(page.tags) <= {"pre", "span"}
    assert HOSTILE not in html and html == drawn(shown[kind])
    assert kind in ("inspect", "bench") or "&lt;script&gt;" in html


def test_the_table_of_a_run_is_that_of_its_summary_and_a_number_has_none(shown):
    assert f"{shown['summary'].remove_reached:.1%} of all" in drawn(shown["prune"]) == drawn(shown["summary"])
    with pytest.raises(secateur.RecipeError, match=r"^table: takes what prune, .* returned, got 3\.$"):
        secateur.table(3)


def test_what_was_left_out_of_the_text_is_said_in_results(shown):
    for notes in (shown["summary"].warnings, shown["evaluate"].notes):
        (note,) = (note for note in notes if "left out" in note)
        assert re.fullmatch(r"domain 'code': rows left out, since they hold no text: [1-9]\d*\.", note)


WRONG: dict[str, tuple[type[Strict], dict[str, Any], str]] = {
    "key": (secateur.Recipe, {"remov": 0.2}, "Recipe: unknown key 'remov'; did you mean 'remove'?"),
    "part": (secateur.Recipe, {"remove": {"shar": 0.2}}, "Recipe: unknown key 'remove.shar'; did you mean 'share'?"),
    "value": (Remove, {"share": 2}, "Remove: share: Input should be less than 1, got 2."),
    "no source": (secateur.Domain, {}, "Domain: needs exactly one of installed, files, dataset; got none"),
    "preset": (secateur.Recipe, {"preset": "best"}, "Recipe: preset: belongs to a mapping; where a recipe is"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_in_a_recipe_is_one_sentence(name):
    made, keys, sentence = WRONG[name]
    with pytest.raises(secateur.RecipeError) as raised:
        made(**keys)
    assert str(raised.value).startswith(sentence) and "\n" not in str(raised.value) and raised.value.__cause__ is None


def test_names_are_found_by_completion_and_make_recipes():
    names = dir(secateur)
    assert {"prune", "inspect", "Recipe", "bars", "__version__", *secateur.__all__} <= set(names)
    assert "annotations" not in names and "import_module" not in names
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", secateur.__version__)
    assert "remove" in inspect.signature(secateur.Recipe).parameters
    assert secateur.Recipe(remove=0.3) == parse_recipe({"remove": 0.3}) == secateur.Recipe(remove=Remove(share=0.3))


def test_bars_follow_the_stages(capsys):
    listen = secateur.bars()
    for stage, done in (("walk", 0), ("walk", 3), ("walk", 4), ("walk", 4), ("save", 1), ("walk", 0), ("walk", 4)):
        listen(stage, done, 1 if stage == "save" else 4)
    drawn = capsys.readouterr().err
    assert len(re.findall(r"walk: 100%\S* 4/4", drawn)) == 2, "a stage that comes again has a bar again"
    assert "save" not in drawn and "walk:   0%" in drawn
