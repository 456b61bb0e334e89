"""The model card read as Markdown, and the page: names of models and domains are text, whatever they hold."""

import dataclasses
import html
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from page_checks import PageChecks

from secateur.facts import Loss
from secateur.recipe import Calibration, Domain, Recipe
from secateur.report.page import Table, code, escaped, markdown, render
from secateur.report.records import RecoveryRecord, ResultFiles, Summary, VocabularyFacts
from secateur.report.report import model_card, recovered_card, report_page
from tests.report.test_shown import BARE, RECOVERY

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = [
    "<script>alert(1)</script>",
    "a\n# Owned\n\nfree",
    "a\r\n---\r\nlicense: evil\r\n---",
    "a | b | c",
    "`code` and ``more",
    "**bold** _it_ __init__ ~~gone~~",
    "[link](javascript:alert(1)) ![x](http://evil)",
    "&lt;b&gt; &#35; \\| \\`",
    "<!-- open",
    "```\nfence",
    "- item\n- item\n1. one",
    "1. one",
    "2) two",
    "+ plus",
    "# head",
    "bidi\u202e\x07\x1b[31m\u2028x",
    "lone\udc80",
]


def summary(model: str, domain: str, note: str, command: str) -> Summary:
    counts = {key: {domain: 640} for key in ("num_tokens", "num_held_out_tokens", "num_judged_tokens")}
    facts = dataclasses.replace(BARE.calibration, held_out_overlap={domain: 0.5}, **counts)
    loss = {domain: Loss(3.0, 0.1, 100)}
    changes = {"dense_losses": loss, "pruned_losses": loss, "warnings": (note,), "calibration": facts}
    return dataclasses.replace(BARE, model=model, command=command, **changes)


def recipe_of(run: Summary) -> Recipe:
    # A recipe refuses such names; a card does not trust that one wrote it.
    domains = {name: Domain(installed="code") for name in run.calibration.num_tokens}
    return Recipe().model_copy(update={"calibration": Calibration().model_copy(update={"domains": domains})})


def test_the_three_domains_that_lost_most_are_named():
    lost = {"a": 3.2, "b": 3.4, "c": 2.9, "d": 3.3, "e": 3.1}
    pruned = {name: Loss(nats, 0.1, 100) for name, nats in lost.items()}
    dense = {name: Loss(3.0, 0.1, 100) for name in lost}
    run = dataclasses.replace(summary("m", "a", "", ""), dense_losses=dense, pruned_losses=pruned)
    times = {"b": 1.49, "d": 1.35, "a": 1.22}
    told = [f"{name} ({ratio} times the dense model's perplexity)" for name, ratio in times.items()]
    assert f"It lost most on {', '.join(told)}. " in model_card(run, recipe_of(run))


def recovery(name: str) -> RecoveryRecord:
    verdicts = {name: RECOVERY.dense["prose"]}
    training = dataclasses.replace(RECOVERY.training, after=verdicts)
    named = {"pruned": name, "teacher": name, "command": f"secateur recover {name}", "notes": (name,)}
    changes = {"dense": verdicts, "before": verdicts, "training": training, "judged": {}, "content_hash": "0"}
    return dataclasses.replace(RECOVERY, **named, **changes)


def named(name: str) -> ResultFiles:
    """Return the files of a result, trimmed and recovered, in which all that has a name is called this."""
    vocabulary = VocabularyFacts(1024, 512, {name: (1, 2)}, {name: (20, 2)}, {name: (1.0, 2.0)}, 0.125)
    run = dataclasses.replace(summary(name, name, name, f"secateur prune {name} out"), vocabulary=vocabulary)
    return ResultFiles(run, (), (), recipe_of(run), None, None, recovery(name))


def tokens(text: str) -> list[Token]:
    found = READER.parse(text)
    return [each for token in found for each in (token, *(token.children or ()))]


def shown(text: str) -> str:
    """Return how a reader sees a name: on one line, what cannot be printed as a space."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_in_the_card_and_on_the_page(name):
    files, plain = named(name), named("name")
    card, quiet = (recovered_card(model_card(each.summary, each.recipe), each.recovery) for each in (files, plain))
    _, front, body = card.split("---\n", 2)
    # What was given is named in the text alone.
    assert yaml.safe_load(front) == yaml.safe_load(quiet.split("---\n", 2)[1])
    assert [token.type for token in tokens(body)] == [token.type for token in tokens(quiet.split("---\n", 2)[2])]
    seen = html.unescape(re.sub(r"<[^>]*>", "", READER.render(body)))
    # Title, verdict, row, calibration, overlap, note and caveat; script and domain of tokens; the recovery.
    assert seen.count(shown(name)) >= 14
    assert "<script" not in READER.render(body) and card.encode()
    page, quiet = (render(report_page(each)) for each in (files, plain))
    assert PageChecks(page).problems == [] and PageChecks(page).tags == PageChecks(quiet).tags
    assert page.replace("&#39;", "&#x27;").replace("&#34;", "&quot;").count(html.escape(name)) >= 17


@given(st.text(max_size=40))
def test_any_text_is_one_paragraph_of_the_same_text(text):
    found = tokens(f"- label: {escaped(text)}")
    kinds = {token.type for token in found} - {"text", "text_special", "inline"}
    assert kinds == {f"{kind}_{end}" for kind in ("bullet_list", "list_item", "paragraph") for end in ("open", "close")}
    seen = "".join(token.content for token in found if token.type in ("text", "text_special"))
    assert seen == f"label: {shown(text)}".strip()


@given(st.text(min_size=1, max_size=40))
def test_any_command_is_one_piece_of_code(text):
    found = tokens(f"- command: {code(f'secateur {text}')}")
    escapes = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    pieces = [token.content.strip() for token in found if token.type == "code_inline"]
    assert pieces == [f"secateur {escapes}".strip()]


@given(st.lists(st.text(max_size=20), min_size=2, max_size=2))
def test_a_row_keeps_its_cells(cells):
    table = Table("", ("name", "value"), [cells])
    found = tokens("\n".join(markdown(table)))
    assert [token.type for token in found].count("td_open") == 2
    assert not any(token.type.startswith(("html", "link", "code")) for token in found)


def test_a_bar_ends_no_cell():
    header, rule, row = markdown(Table("a | b", ("c | d", "e"), (("f | g", "h"),)))
    assert [line.count("|") for line in (header, rule, row)] == [3, 3, 3]
