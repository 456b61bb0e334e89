"""What a notebook meets: names, one-sentence errors, results as a line and as tables, bars."""

import inspect
import json
import re
from typing import Any

import pytest
from page_checks import PageChecks
from recipes import grouped

import secateur
from secateur.evaluation.study import Comparison, FoundCell
from secateur.facts import Loss, TrainingRecord, Verdict
from secateur.recipe import Remove, Strict, parse_recipe
from secateur.report.records import RecoveryRecord


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
    sizes = {"prompt_tokens": 16, "new_tokens": 4, "repeats": 2}
    verdicts = [{HOSTILE: Verdict(kl, 0.1, 3.0 + kl, 0.9, 100, kl)} for kl in (0.0, 0.5, 0.25)]
    training = TrainingRecord(100, 1.0, verdicts[2], held=True)
    figures = {"seed": 0, "content_hash": "0", "sequence_length": 32, "num_held_out_tokens": 64, "seconds": {}}
    figures |= {"peak_bytes": 1, "reload_max_abs_difference": 0.0, "versions": {}}
    parts = {"dense": verdicts[0], "before": verdicts[1], "training": training, "notes": (HOSTILE,), "judged": {}}
    grid = [("dense", 0.0, 2.0), ("ours", 0.2, 2.25), (HOSTILE, 0.2, 2.5)]
    cells = [
        FoundCell(name, gone, 0, gone, 1.0, dict.fromkeys("ab", Loss(nats, None, 1)), {}) for name, gone, nats in grid
    ]
    return {
        "prune": pruned,
        "summary": pruned.summary,
        "inspect": secateur.inspect(dense, keys),
        "evaluate": secateur.evaluate(out, dense),
        "bench": secateur.bench(out, dense, **sizes),
        "recover": RecoveryRecord(HOSTILE, HOSTILE, "", {}, {}, **figures, **parts),
        "compare": Comparison(tuple(cells), {}),
    }


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


def test_the_tables_say_what_matters(shown):
    assert f"{shown['summary'].remove_reached:.1%} of all" in drawn(shown["prune"]) == drawn(shown["summary"])
    assert "50.0% won back" in drawn(shown["recover"])
    assert "ours has the lowest (9.49)" in re.sub(r"\s+", " ", drawn(shown["compare"]))


def test_what_has_no_table_is_one_sentence():
    with pytest.raises(secateur.RecipeError, match=r"^table: takes what prune, .* returned, got 3\.$"):
        secateur.table(3)


def test_what_was_left_out_of_the_text_is_said_in_results(shown):
    for notes in (shown["summary"].warnings, shown["evaluate"].notes):
        (note,) = (note for note in notes if "left out" in note)
        assert re.fullmatch(r"domain 'code': rows left out, since they hold no text: [1-9]\d*\.", note)


def test_names_are_found_by_completion():
    names = dir(secateur)
    assert {"prune", "inspect", "Recipe", "bars", "__version__", *secateur.__all__} <= set(names)
    assert "annotations" not in names and "import_module" not in names
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", secateur.__version__)


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


def test_recipes_are_made_as_before():
    assert secateur.Recipe(remove=0.3) == parse_recipe({"remove": 0.3}) == secateur.Recipe(remove=Remove(share=0.3))
    assert "remove" in inspect.signature(secateur.Recipe).parameters


def test_bars_follow_the_stages(capsys):
    listen = secateur.bars()
    for stage, done in (("walk", 0), ("walk", 3), ("walk", 4), ("walk", 4), ("save", 1), ("walk", 0), ("walk", 4)):
        listen(stage, done, 1 if stage == "save" else 4)
    drawn = capsys.readouterr().err
    assert len(re.findall(r"walk: 100%\S* 4/4", drawn)) == 2, "a stage that comes again has a bar again"
    assert "save" not in drawn and "walk:   0%" in drawn
