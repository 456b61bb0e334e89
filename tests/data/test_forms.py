"""Chats and tables as people have them: the text that the template writes, what is left out, and what is said of it."""

import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from texts import split_text
from tiny_tokenizer import tiny_tokenizer

from secateur.data.forms import Notes, chat_text, content_of
from secateur.data.sources import SOURCES, documents
from secateur.errors import CalibrationError
from secateur.recipe import Calibration, Domain

# Like many templates in use: calls and tools as JSON, and tests of what a message has.
TEMPLATE = """{% if tools %}(tools) {{ tools | tojson }}
{% endif %}{% for message in messages %}<{{ message.role }}{% if message.name is
 defined %} {{ message.name }}{% endif %}>{% if message.reasoning_content is defined %}({{
 message.reasoning_content }}){% endif %}{{ message.content | trim }}{% if message.tool_calls is
 defined %}{% for call in message.tool_calls %}{{ call.function.name }}!{{ call.function.arguments | tojson
 }}{% endfor %}{% endif %}</>{% endfor %}"""
# Like those of gemma and mistral.
STRICT = """{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{
raise_exception('roles must alternate') }}{% endif %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"""


def told(rows: list[Any], path: Path, template: str = TEMPLATE, **domain: Any) -> tuple[list[str], tuple[str, ...]]:
    """Return the documents of rows in a file, sorted, and the notes."""
    file = path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tokenizer, notes = tiny_tokenizer(), Notes()
    tokenizer.chat_template = template
    found = sorted(documents("mine", Domain(files=(str(file),), **domain), tokenizer, 0, notes.of("mine")))
    return found, notes.sentences()


HI, SAID = "<user>hi</><assistant>ho</>", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
CALL = {"id": "a1", "type": "function", "function": {"name": "sum", "arguments": '{"of": [1, 2]}'}}
CALLED = '<assistant>sum!{"of": [1, 2]}</><tool>3</>'
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": SAID}, HI),
    "sharegpt": ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, HI),
    "sharegpt with a system": (
        {"id": "x", "system": "be brief", "conversations": [{"from": "human", "value": "hi"}]},
        "<system>be brief</><user>hi</>",
    ),
    "what a model reasoned": (
        {"messages": [*SAID[:1], {**SAID[1], "reasoning_content": "hm"}]},
        "<user>hi</><assistant>(hm)ho</>",
    ),
    "conversation of roles": ({"conversation": [*SAID[:1], {"role": "bot", "content": "ho"}]}, HI),
    "messages as JSON": ({"messages": json.dumps(SAID)}, HI),
    "alpaca": ({"instruction": "hi", "input": "", "output": "ho"}, HI),
    "alpaca with an input": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        "<user>Add.\n\n1 2</><assistant>3</>",
    ),
    "dolly": ({"instruction": "hi", "context": None, "response": "ho", "category": "open_qa"}, HI),
    "orca": ({"system_prompt": "s", "question": "hi", "response": "ho"}, f"<system>s</>{HI}"),
    "prompt and completion": ({"prompt": "hi", "completion": "ho"}, HI),
    "both as messages": ({"prompt": SAID[:1], "completion": SAID[1:]}, HI),
    "preferences": ({"prompt": "hi", "chosen": SAID, "rejected": SAID[:1]}, HI),
    "preferences as text": ({"prompt": "hi", "chosen": "ho", "rejected": "no"}, HI),
    "preferences alone": ({"chosen": SAID, "rejected": SAID[:1]}, HI),
    "a text first": ({"text": "plain", "messages": SAID}, "plain"),
    "a null text beside a chat": ({"text": None, "messages": SAID}, HI),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}]}, SAID[1]]}, HI),
    "null content with calls": (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}]},
        CALLED,
    ),
    "a call alone": (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        CALLED.removesuffix("<tool>3</>"),
    ),
    "calls of sharegpt, and tools": (
        {
            "conversations": [
                {"from": "function_call", "value": json.dumps({"name": "sum", "arguments": {"of": [1, 2]}})},
                {"from": "observation", "value": "3"},
            ],
            "tools": json.dumps([{"name": "sum"}]),
        },
        '(tools) [{"type": "function", "function": {"name": "sum"}}]\n' + CALLED,
    ),
    "calls of before": (
        {
            "messages": [
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "content": "3"},
            ]
        },
        CALLED,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_text(form: str, tmp_path: Path) -> None:
    row, text = FORMS[form]
    assert told([row], tmp_path) == ([text], ())


def test_fields_that_a_table_fills_up_are_no_fields() -> None:
    # transformers drops them too since 5.24; a template must not see them in any version.
    found = content_of({"messages": [{**SAID[0], "tool_calls": None, "name": None}]}, "text", "row 1")
    assert not isinstance(found, str) and found.messages == SAID[:1]


def test_a_chat_in_a_column_of_any_name(tmp_path: Path) -> None:
    rows = [{"text": "x", "dialog": SAID, "output": "y"}]
    assert told(rows, tmp_path, column="dialog") == ([HI], ())
    assert told(rows, tmp_path, column="output") == (["y"], ())
    with pytest.raises(CalibrationError, match="line 1: no column 'words'; there are: messages;"):
        told([{"messages": SAID}], tmp_path, column="words")  # a chat stands in for `text` alone


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    empty = [None, {"text": None}, {"id": 1}, {"messages": []}, {"messages": [{"role": "user", "content": None}]}]
    empty += [{"instruction": "x", "output": None}, {"text": None, "messages": None}]
    found, notes = told([*empty, {"text": "x"}, {"text": " "}, {"messages": SAID}], tmp_path)
    assert found == [HI, "x"]
    assert notes == ("domain 'mine': rows left out, since they hold no text: 7.",)


def test_a_count_stays_what_it_is_if_the_text_is_read_twice(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": f"line {number} of a text"} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, *[{"text": None}] * 9])))
    domains = {"mine": Domain(files=(str(tmp_path / "a.jsonl"),))}
    asked = (Calibration(domains=domains, sequence_length=8), 500, tiny_tokenizer(), 0)
    # More than there is to judge on: the text is read to its end, and again without.
    split = split_text(*asked, num_judged_tokens=10_000)
    assert split.learning.text.notes[0] == "domain 'mine': rows left out, since they hold no text: 9."
    assert split.judged.notes[0].startswith("domain 'mine': too short for a part that only judges")


def test_parts_that_are_no_text_are_said(tmp_path: Path) -> None:
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    rows = [{"messages": [{"role": "user", "content": ["see ", picture, {"type": "text", "text": "this"}]}]}]
    assert told(rows, tmp_path) == (
        ["<user>see this</>"],
        ("domain 'mine': chats read without their parts that are no text, such as images: 1.",),
    )


def test_a_template_without_a_system_gets_it_from_the_user_and_says_so(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": "be brief"}, *SAID, {"role": "user", "content": "?"}]}]
    note = (
        "domain 'mine': chats whose system message stands in the first user's, since the chat template refuses it: 1."
    )
    assert told(rows, tmp_path, STRICT) == (["u:be brief\n\nhi;a:ho;u:?;"], (note,))


def test_chats_that_a_template_refuses_are_left_out_and_counted(tmp_path: Path) -> None:
    called = {"messages": [SAID[0], {"role": "tool", "content": "3"}, {"role": "tool", "content": "3"}]}
    found, notes = told([{"messages": SAID}, {"messages": SAID[1:]}, called], tmp_path, STRICT)
    assert found == ["u:hi;a:ho;"]
    assert notes == ("domain 'mine': chats left out, since the chat template refuses them: 2.",)
    with pytest.raises(CalibrationError, match=r"rows.jsonl, line [12]: .*refuses it \(roles must alternate\)"):
        told([{"messages": SAID[1:]}, called], tmp_path, STRICT)


def test_a_mistake_of_a_template_is_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"refuses it .*has no attribute 'x'"):
        told([{"text": "x"}, {"messages": SAID}], tmp_path, "{{ messages[0].x.y }}")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no role": ({"messages": [{"content": "x"}]}, "messages must be a list of objects with role and content"),
    "no list": ({"messages": "[{'role': 'user'}]"}, "messages must be a list of objects"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, "the text must be a string, got int"),
    "answer": ({"question": "1 + 2?", "answer": 3}, "the text must be a string, got int"),
    "calls": ({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "tool_calls must be a list of objects"),
    "tools": ({"messages": SAID, "tools": ["x"]}, "tools must be a list of objects"),
    "system": ({"messages": SAID, "system": 3}, "the text must be a string, got int"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_chat_is_one_sentence(name: str, tmp_path: Path) -> None:
    row, sentence = BAD[name]
    with pytest.raises(CalibrationError, match=rf"rows.jsonl, line 1: {sentence}"):
        told([row], tmp_path)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"id": 1, "text": None}] * 3, "line 1: its text is null; there are: id, text; set `column` to one that"),
        ([None, None], "line 1: it is null."),
        ([{"id": 1, "body": "x"}], "line 1: no column 'text'; there are: id, body; set `column` to one of them."),
        ([{"instruction": "x", "output": None}], "line 1: its text is null; there are: instruction, output;"),
        ([{"text": " "}, {"text": ""}], "rows.jsonl: column 'text' is blank in every row; set `column`"),
        ([{"messages": [{"role": "user", "content": None}]}], "line 1: its messages hold no text."),
    ],
)
def test_a_file_without_a_row_that_has_text_names_its_fields(rows: list[Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as raised:
        told(rows, tmp_path)
    assert sentence in str(raised.value)


def test_a_file_without_text_is_an_error_beside_others(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text('{"text": "x"}')
    (tmp_path / "bad.jsonl").write_text('{"text": null}')
    files = tuple(str(tmp_path / f"{name}.jsonl") for name in ("good", "bad"))
    with pytest.raises(CalibrationError, match=r"bad.jsonl, line 1: its text is null"):
        list(documents("mine", Domain(files=files), tiny_tokenizer(), 0))


def test_a_stream_of_rows_without_text_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: Any) -> Any:
        while True:
            asked.append(1)
            yield {"text": None}

    asked: list[int] = []
    monkeypatch.setitem(SOURCES, "dataset", endless)
    with pytest.raises(CalibrationError, match="document 1: its text is null; there are: text"):
        list(documents("mine", Domain(dataset="a/b"), tiny_tokenizer(), 0))
    assert len(asked) == 200


def read(*files: Path | str, note: Notes | None = None) -> list[str]:
    domain = Domain(files=tuple(map(str, files)))
    return sorted(documents("mine", domain, tiny_tokenizer(), 0, (note or Notes()).of("mine")))


def tree(root: Path) -> Path:
    for name in ("b.py", "a.md", "deep/er/c.txt", ".hidden.txt", ".git/d.txt", "e.bin", "deep/empty.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("" if "empty" in name else f"text of {name}")
    (root / "rows.jsonl").write_text('{"text": "a row"}\n')
    return root


def test_a_directory_is_all_its_files_but_hidden_ones(tmp_path: Path) -> None:
    notes = Notes()
    assert read(tree(tmp_path), note=notes) == ["a row", "text of a.md", "text of b.py", "text of deep/er/c.txt"]
    assert set(notes.sentences()) == {
        "domain 'mine': files left out, since files of their kind are not read: 1.",
        "domain 'mine': files left out, since they hold no text: 1.",
    }


def test_patterns_name_files_at_any_depth(tmp_path: Path) -> None:
    root = tree(tmp_path)
    assert read(root / "*.md", root / "**/*.txt") == ["text of a.md", "text of deep/er/c.txt"]
    (root / "odd[1].txt").write_text("brackets")
    assert read(root / "odd[1].txt") == ["brackets"]
    for nothing in ("*.rst", "**/nothing"):
        with pytest.raises(CalibrationError, match=r"there is no file there; hidden ones do not count\.$"):
            read(root / nothing)
    with pytest.raises(CalibrationError, match=r"there is no file of a kind that is read\.$"):
        read(root / "*.bin")
    with pytest.raises(CalibrationError, match=r"empty.py: it is empty"):
        read(root / "deep/e*.py")


def test_the_home_directory_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree(tmp_path)))
    assert read("~/a.md") == ["text of a.md"] and read("~/deep") == ["text of deep/er/c.txt"]


@pytest.mark.parametrize("suffix", [".md", ".py", ".rs", ".PY", ".tex.gz"])
def test_text_and_code_are_text(suffix: str, tmp_path: Path) -> None:
    data = b"# one\n\ntwo\n"
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert read(tmp_path / f"a{suffix}") == [data.decode()]


def test_tables_with_tabs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\ttext\n1\tone, two\n2\t"Stop" he said\n3\tan " inch\n')
    assert sorted(read(tmp_path / "a.tsv")) == ['"Stop" he said', 'an " inch', "one, two"]


def test_missing_cells_of_a_table_are_left_out(tmp_path: Path) -> None:
    notes = Notes()
    (tmp_path / "a.csv").write_text("id,text\n1,x\n2\n3,\n")
    assert read(tmp_path / "a.csv", note=notes) == ["x"]
    assert notes.sentences() == ("domain 'mine': rows left out, since they hold no text: 1.",)


# As in Llama 3's template.
DATED = """\
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{{- "Today: " + date_string + "\\n" }}{%- for each in messages %}{{- each["content"] }}{%- endfor %}"""


def test_the_date_in_a_template_is_the_same_on_any_day(monkeypatch):
    """The day after the one on which transformers was loaded too."""
    from transformers.utils import chat_template_utils

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2031, 2, 3)

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DATED
    chat = [{"role": "user", "content": "hi"}]
    today = chat_text(chat, tokenizer, "row")
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert "03 Feb 2031" in tokenizer.apply_chat_template(chat, tokenize=False)  # what it would be
    assert today == chat_text(chat, tokenizer, "row") == "Today: 26 Jul 2024\nhi"
