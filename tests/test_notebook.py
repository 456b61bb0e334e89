"""What a notebook meets: names, one-sentence errors, results as a line, as HTML and as frames, bars."""

import inspect
import json
import re
import sys
from typing import Any

import pandas
import pytest
from page_checks import PageChecks
from recipes import grouped

import secateur
from secateur.evaluation import study_page
from secateur.evaluation.study import Comparison, FoundCell
from secateur.facts import TrainingRecord, Verdict
from secateur.recipe import Choose, Remove, Strict
from secateur.recipe_file import parse_recipe
from secateur.report.measured import RecoveryRecord
from secateur.report.page import Shown


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
    verdicts = [{HOSTILE: Verdict(kl, 0.1, 3.0 + kl, 0.9, 100)} for kl in (0.0, 0.5, 0.25)]
    training = TrainingRecord(100, 1.0, 1.0, verdicts[2], held=True)
    figures = {"seed": 0, "content_hash": "0", "sequence_length": 32, "num_held_out_tokens": 64, "seconds": {}}
    figures |= {"judge_flops": 1.0, "peak_bytes": 1, "reload_max_abs_difference": 0.0, "versions": {}}
    parts = {"dense": verdicts[0], "before": verdicts[1], "training": training, "notes": (HOSTILE,)}
    grid = [("dense", 0.0, 2.0), ("ours", 0.2, 2.25), (HOSTILE, 0.2, 2.5)]
    cells = [FoundCell(name, gone, 0, gone, 1.0, {"a": nats, "b": nats}, {}) for name, gone, nats in grid]
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_a_line(kind, shown):
    line = repr(shown[kind])
    assert line.startswith(f"<{type(shown[kind]).__name__}: ") and "\n" not in line and len(line) < 400


def test_the_line_says_what_matters(shown):
    line, summary = repr(shown["prune"]), shown["summary"]
    assert f"Pruning removed {summary.remove_reached:.1%} of the parameters" in line
    assert line.removeprefix("<Result") == repr(summary).removeprefix("<Summary")
    assert re.search(r" against \S+llama: perplexity [\d.]+ to [\d.]+>$", repr(shown["evaluate"]))
    assert re.search("times as fast|not measurably different", repr(shown["bench"]))
    assert "50.0% of the lost log-perplexity" in repr(shown["recover"])
    assert f"<Comparison: {study_page.verdict(list(shown['compare'].cells))}>" == repr(shown["compare"])
    assert "at 20% removed ours has the lowest (9.49)" in repr(shown["compare"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_html_stands_on_its_own_and_is_escaped(kind, shown):
    page = PageChecks(html := shown[kind]._repr_html_())
    assert page.problems == [] and "table" in page.tags and len(page.svgs) == 1
    assert all(value.startswith("#") for value in page.loads) and set(re.findall(r"url\((.)", html)) <= {"#"}
    assert HOSTILE not in html and "script" not in page.tags and "style" not in page.tags
    assert kind in ("inspect", "bench") or "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert set(re.findall(r"var\((--\w+)\)", html)) <= set(re.findall(r"(--\w+):", html)), "a colour of the page's"
    assert html == shown[kind]._repr_html_()


def test_two_results_of_a_notebook_share_no_ids(shown):
    ids = [set(PageChecks(shown[kind]._repr_html_()).ids) for kind in ("prune", "evaluate", "bench", "recover")]
    assert all(ids) and len(set().union(*ids)) == sum(map(len, ids))


def test_without_matplotlib_the_picture_is_missed_and_the_table_there(shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    real = secateur.report.page.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else real(name))
    page = PageChecks(html := shown["prune"]._repr_html_())
    assert not page.svgs and "table" in page.tags and "needs matplotlib: pip install" in html


def test_frames_hold_the_numbers(shown):
    summary, frame = shown["summary"], shown["prune"].to_frame()
    assert isinstance(frame, pandas.DataFrame) and list(frame.domain) == [HOSTILE, "code"]
    assert list(frame.pruned_nats_per_token) == [loss.nats_per_token for loss in summary.pruned_losses.values()]
    assert list(frame.dense_nats_per_token) == [loss.nats_per_token for loss in summary.dense_losses.values()]
    (group,) = shown["inspect"].to_frame().itertuples()
    assert (group.name, group.num_layers) == ("ffn", 3) and group.num_keep < group.num_units
    evaluated, found = shown["evaluate"], shown["evaluate"].to_frame().set_index(["model", "on", "measure"]).value
    assert found["dense", "code", "nats_per_token"] == evaluated.dense.domains["code"].nats_per_token
    assert found["pruned", "code", "bits_per_byte"] == evaluated.pruned.domains["code"].bits_per_byte
    assert found["pruned", HOSTILE, "kl"] == evaluated.kl[HOSTILE].mean
    timed = shown["bench"].to_frame().set_index("model")
    assert timed.num_params["dense"] > timed.num_params["pruned"]
    assert timed.decode_tokens_per_second["pruned"] == shown["bench"].pruned.speed.decode_tokens_per_second
    assert list(shown["recover"].to_frame().set_index("model").kl) == [0.0, 0.5, 0.25]
    assert list(shown["compare"].to_frame()["nats_per_token b"]) == [2.0, 2.25, 2.5]


def test_a_frame_without_pandas_is_one_sentence(shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(secateur.RecipeError, match=r"^to_frame: needs pandas; run pip install pandas\.$"):
        shown["prune"].to_frame()


def test_what_was_left_out_of_the_text_is_said_in_results(shown):
    for notes in (shown["summary"].warnings, shown["evaluate"].notes):
        (note,) = (note for note in notes if "left out" in note)
        assert re.fullmatch(r"domain 'code': rows left out, since they hold no text: [1-9]\d*\.", note)
        assert note.removeprefix("domain 'code'") in shown["prune"]._repr_html_()


def test_the_records_of_before_have_the_same_json(shown):
    assert json.loads(shown["summary"].to_json())["model"] == shown["summary"].model
    assert type(shown["summary"]).from_json(shown["summary"].to_json(), "here") == shown["summary"]


def test_names_are_found_by_completion():
    names = dir(secateur)
    assert {"prune", "inspect", "Recipe", "bars", "__version__", *secateur.__all__} <= set(names)
    assert "annotations" not in names and "import_module" not in names
    assert all(hasattr(secateur, name) for name in names)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", secateur.__version__)


WRONG: dict[str, tuple[type[Strict], dict[str, Any], str]] = {
    "key": (secateur.Recipe, {"remov": 0.2}, "Recipe: unknown key 'remov'; did you mean 'remove'?"),
    "part": (secateur.Recipe, {"remove": {"shar": 0.2}}, "Recipe: unknown key 'remove.shar'; did you mean 'share'?"),
    "value": (Remove, {"share": 2}, "Remove: the share of total parameters to remove must be a number above"),
    "name": (
        Choose,
        {"budget": "curv"},
        "Choose: unknown budget 'curv'; allowed: uniform, curve; did",
    ),
    "domain": (secateur.Domain, {"file": "x"}, "Domain: unknown key 'file'; did you mean 'files'?"),
    "no source": (secateur.Domain, {}, "Domain: needs exactly one of installed, files, dataset, sampled; got none"),
    "preset": (
        secateur.Recipe,
        {"preset": "best"},
        "Recipe: preset: belongs to a mapping; where a recipe is",
    ),
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


def test_every_public_result_is_shown(shown):
    assert set(shown) == set(KINDS) and all(isinstance(each, Shown) for each in shown.values())
