"""The report of a real tiny run: complete, self-contained, escaped, repeatable; in a browser."""

import dataclasses
import re
import shutil
from html import escape, unescape
from pathlib import Path

import pytest
from browser import CHROMIUM, load
from page_checks import PageChecks
from recipes import grouped

from secateur.api import prune
from secateur.errors import CheckpointError, SecateurError
from secateur.facts import Ancestor, OwnAnswers
from secateur.recipe import RecoverySettings
from secateur.report.records import RecoveryRecord, Summary, read_result
from secateur.report.report import repeat_section, write_page
from secateur.report.rows import verdict

HOSTILE = "<script>alert(1)</script>"
ODD = "$\\frac$ 日本 & co"
SECTIONS = "samples quality speed removed text repeat"


@pytest.fixture(scope="module")
def result(checkpoints, recipe, texts, tmp_path_factory) -> Path:
    """A run of two rounds, evaluated, on domains with names that mean harm."""
    domains = {HOSTILE: {"files": [str(texts["prose"])]}, ODD: {"files": [str(texts["code"])]}}
    calibration = {**recipe["calibration"], "domains": domains}
    out = tmp_path_factory.mktemp("report") / "result"
    prune(checkpoints["llama"], grouped({**recipe, "calibration": calibration, "rounds": 2}), out=out)
    return out


def page_of(directory: Path) -> str:
    return (directory / "report.html").read_text(encoding="utf-8")


def summary_of(directory: Path) -> Summary:
    return Summary.from_json((directory / "result.json").read_text(encoding="utf-8"), "result.json")


def test_prune_writes_a_well_formed_page_that_loads_and_runs_nothing(result):
    html, page = page_of(result), PageChecks(page_of(result))
    assert page.problems == []
    assert [name for name, tag in page.ids.items() if tag == "section"] == SECTIONS.split()
    assert page.loads and all(value.startswith("#") for value in page.loads)
    assert "url(" not in html and "script" not in page.tags and "@import" not in html and "default-src 'none'" in html
    assert HOSTILE not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html  # whole in the tables
    assert "$\\frac$ 日本 &amp; " in html
    # A link to it says what it is of.
    said = dict(re.findall('<meta property="og:([a-z:]+)" content="([^"]*)">', html.split("</head>")[0]))
    assert said["title"] == escape(f"{summary_of(result).model}, pruned by secateur")
    assert unescape(said["description"]) == f"{verdict(summary_of(result))}."
    # Random words of few: prose shares 13-grams only by accident, lines of code that repeat share most.
    shares = summary_of(result).calibration.held_out_overlap
    assert list(shares) == [HOSTILE, ODD]
    assert shares[HOSTILE] is not None and shares[ODD] is not None and shares[HOSTILE] < shares[ODD]
    assert f"{shares[ODD]:.2%}" in html


def test_bars_are_as_long_as_their_rows_say(result):
    html, summary = page_of(result), summary_of(result)
    quality, removed = (html.split(f'<section id="{name}"')[1] for name in ("quality", "removed"))
    quality, removed = (section.split("</section>")[0] for section in (quality, removed))
    losses = zip(summary.pruned_losses.values(), summary.dense_losses.values(), strict=True)
    rises = [pruned.nats_per_token - dense.nats_per_token for pruned, dense in losses]
    rises.append(sum(rises) / len(rises))
    shown = [float(width) for width in re.findall(r'<i style="width: ([\d.]+)%">', quality)]
    assert shown == [round(100 * max(0.0, rise) / max(*rises, 1e-9), 1) for rise in rises]
    for before, kept, width in re.findall(r"<td>(\d+) → (\d+)</td><td class=.bars.*?width: ([\d.]+)%", removed):
        assert float(width) == round(100 * int(kept) / int(before), 1) < 100
    assert removed.count('class="bars"') == 3


def test_the_verdict_of_a_ruin_is_short_and_nothing_may_be_lost(result):
    def said(nats: float) -> str:
        answers = OwnAnswers(48, 3000, 0.75, nats, 0.03, 0.8, (0.9, 0.85), (0.02, 0.05), ())
        return verdict(dataclasses.replace(summary_of(result), remove_reached=0.1973, own_answers=answers))

    assert "(x1000+ perplexity)" in said(1e4) and len(said(11.234)) <= 90
    assert said(0.75) == "20% smaller; lost nothing on the dense model's own answers (x1.00 perplexity)"


def test_a_sibling_and_a_recovery_are_repeated_by_what_made_them(result):
    """A recipe names no units of another result, and a prune refuses the settings of a recovery."""
    files = read_result(result)
    assert "prune llama OUT --recipe recipe.yaml\n" in repeat_section(files).code
    sibling = dataclasses.replace(files.summary, like=Ancestor("my base", None, 1))
    assert "prune llama OUT --like 'my base'\n" in repeat_section(dataclasses.replace(files, summary=sibling)).code
    recovery = object.__new__(RecoveryRecord)
    object.__setattr__(recovery, "command", "secateur recover a --teacher b --out c")
    recipe = files.recipe.model_copy(update={"recover": RecoverySettings()})
    recovered = repeat_section(dataclasses.replace(files, recipe=recipe, recovery=recovery)).code
    assert "OUT --recipe recipe.yaml\nsecateur recover a --teacher b --out c\n" in recovered
    assert "recover:" not in recovered


def test_a_summary_goes_to_json_and_back(result):
    text = (result / "result.json").read_text(encoding="utf-8")
    assert Summary.from_json(text, "result.json").to_json() == text
    with pytest.raises(CheckpointError, match=r"^here: dense_size\.?.*num_params: .*make it again\.$"):
        Summary.from_json(text.replace('"num_params"', '"count"', 1), "here")


def test_a_page_is_rebuilt_to_the_same_bytes_or_a_damaged_result_is_one_sentence(result, tmp_path):
    copy, before = Path(shutil.copytree(result, tmp_path / "copy")), page_of(result)
    (copy / "report.html").unlink()
    write_page(copy)
    assert page_of(copy) == before
    for name, content, sentence in (
        ("result.json", None, r"result\.json cannot be read .*; give a directory"),
        ("run.jsonl", None, r"run\.jsonl cannot be read"),
        ("result.json", "{", r"result\.json: .*make it again"),
        ("run.jsonl", '{"event": "group"}\n', r"run\.jsonl: round: field required; .*"),
        ("recipe.yaml", "remov: 1", r"recipe .*unknown key 'remov'; did you mean 'remove'"),
        ("bench.json", "[]", r"bench\.json: .*make it again"),
    ):
        shutil.copytree(result, copy, dirs_exist_ok=True)
        (copy / name).unlink(missing_ok=True) if content is None else (copy / name).write_text(content)
        with pytest.raises(SecateurError, match=rf"^[^\n]*{sentence}[^\n]*$"):
            write_page(copy)
        assert page_of(copy) == before


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_loads_the_page_and_asks_nobody_for_anything(result, tmp_path):
    frames = [
        f'<iframe src="{(result / "report.html").as_uri()}" style="border: 0; width: {width}px; height: 800px" '
        f'onload="document.body.dataset.width{width} = this.contentDocument.documentElement.scrollWidth; '
        "document.body.dataset.heading = this.contentDocument.body.innerText.includes('Quality by domain')\"></iframe>"
        for width in (320, 360, 1280)
    ]
    (tmp_path / "frames.html").write_text("\n".join(frames), encoding="utf-8")
    loaded = load(tmp_path / "frames.html", tmp_path)
    assert 'data-heading="true"' in loaded.document and loaded.console == [] and loaded.requests == set()
    # It never scrolls sideways.
    widths = dict(re.findall(r'data-width(\d+)="(\d+)"', loaded.document))
    assert widths == {width: width for width in ("320", "360", "1280")}
    bad = '<img src="https://example.invalid/x.png"><script>throw new Error("boom")</script>'
    (tmp_path / "bad.html").write_text(bad, encoding="utf-8")
    loaded = load(tmp_path / "bad.html", tmp_path)
    assert loaded.requests == {"https://example.invalid/x.png"} and "boom" in loaded.console[0], "both would be seen"
