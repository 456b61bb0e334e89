"""Chats and tables as people have them: the text that the template writes, what is left out, and what is said of it."""

import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from shown import assert_shown
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


def told(*files: str, template: str = TEMPLATE, **domain: Any) -> list[str]:
    """Return the documents of files, sorted, and the notes, or the sentence that refuses them."""
    tokenizer, notes = tiny_tokenizer(), Notes()
    tokenizer.chat_template = template
    try:
        found = sorted(documents("mine", Domain(files=files, **domain), tokenizer, 0, notes.of("mine")))
    except CalibrationError as error:
        return [f"    refused: {error}"]
    return [*(f"    {text!r}" for text in found), *(f"    note: {note}" for note in notes.sentences())]


def of_rows(rows: list[Any], **options: Any) -> list[str]:
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return told("rows.jsonl", **options)


SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
CALL = {"id": "a1", "type": "function", "function": {"name": "sum", "arguments": '{"of": [1, 2]}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
CALLED_BEFORE = {"role": "assistant", "content": None, "function_call": CALL["function"]}
CALLED_IN_TEXT = {"from": "function_call", "value": json.dumps({"name": "sum", "arguments": {"of": [1, 2]}})}
SYSTEM = {"role": "system", "content": "be brief"}
PICTURE = {"type": "image_url", "image_url": {"url": "x"}}
FORMS: dict[str, Any] = {
    "messages": {"messages": SAID},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    "sharegpt with a system": {"id": "x", "system": "be brief", "conversations": [{"from": "human", "value": "hi"}]},
    "what a model reasoned": {"messages": [SAID[0], {**SAID[1], "reasoning_content": "hm"}]},
    "conversation of roles": {"conversation": [SAID[0], {"role": "bot", "content": "ho"}]},
    "messages as JSON": {"messages": json.dumps(SAID)},
    "alpaca": {"instruction": "hi", "input": "", "output": "ho"},
    "alpaca with an input": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "dolly": {"instruction": "hi", "context": None, "response": "ho", "category": "open_qa"},
    "orca": {"system_prompt": "s", "question": "hi", "response": "ho"},
    "prompt and completion": {"prompt": "hi", "completion": "ho"},
    "both as messages": {"prompt": SAID[:1], "completion": SAID[1:]},
    "preferences": {"prompt": "hi", "chosen": SAID, "rejected": SAID[:1]},
    "preferences as text": {"prompt": "hi", "chosen": "ho", "rejected": "no"},
    "preferences alone": {"chosen": SAID, "rejected": SAID[:1]},
    "a text first": {"text": "plain", "messages": SAID},
    "a null text beside a chat": {"text": None, "messages": SAID},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}]}, SAID[1]]},
    "parts that are no text": {"messages": [{"role": "user", "content": ["see ", PICTURE, {"text": "this"}]}]},
    "null content with calls": {"messages": [CALLED, {"role": "tool", "content": "3"}]},
    "a call alone": {"messages": [CALLED]},
    "calls of sharegpt, and tools": {
        "conversations": [CALLED_IN_TEXT, {"from": "observation", "value": "3"}],
        "tools": json.dumps([{"name": "sum"}]),
    },
    "calls of before": {"messages": [CALLED_BEFORE, {"role": "function", "content": "3"}]},
    "no role": {"messages": [{"content": "x"}]},
    "no list": {"messages": "[{'role': 'user'}]"},
    "turns that are no objects": {"messages": ["x"]},
    "content that is no text": {"messages": [{"role": "user", "content": 3}]},
    "an answer that is no text": {"question": "1 + 2?", "answer": 3},
    "calls that are no objects": {"messages": [{"role": "assistant", "tool_calls": ["x"]}]},
    "tools that are no objects": {"messages": SAID, "tools": ["x"]},
    "a system that is no text": {"messages": SAID, "system": 3},
    "null": None,
    "no column of that name": {"id": 1, "body": "x"},
    "an answer that is null": {"instruction": "x", "output": None},
    "messages without text": {"messages": [{"role": "user", "content": None}]},
}
WITHOUT_TEXT = [None, {"text": None}, {"id": 1}, {"messages": []}, FORMS["messages without text"]]
WITHOUT_TEXT += [FORMS["an answer that is null"], {"text": None, "messages": None}]
REFUSED_BY_STRICT = [{"messages": SAID[1:]}, {"messages": [SAID[0], *[{"role": "tool", "content": "3"}] * 2]}]
# Rows of a file, and how it is read.
SEVERAL: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "texts that are null": ([{"id": 1, "text": None}] * 3, {}),
    "texts that are blank": ([{"text": " "}, {"text": ""}], {}),
    "rows without text beside others": ([*WITHOUT_TEXT, {"text": "x"}, {"text": " "}, {"messages": SAID}], {}),
    "a chat in a column of any name": ([{"text": "x", "dialog": SAID, "output": "y"}], {"column": "dialog"}),
    "a text in a column of any name": ([{"text": "x", "dialog": SAID, "output": "y"}], {"column": "output"}),
    "a chat in place of another column": ([{"messages": SAID}], {"column": "words"}),
    "no system in the template": (
        [{"messages": [SYSTEM, *SAID, {"role": "user", "content": "?"}]}],
        {"template": STRICT},
    ),
    "some that the template refuses": ([{"messages": SAID}, *REFUSED_BY_STRICT], {"template": STRICT}),
    "all that the template refuses": (REFUSED_BY_STRICT, {"template": STRICT}),
    "a mistake of a template": ([{"text": "x"}, {"messages": SAID}], {"template": "{{ messages[0].x.y }}"}),
}


def test_what_is_read_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for name, row in FORMS.items() for line in (name, *of_rows([row]))]
    lines += [line for name, (rows, options) in SEVERAL.items() for line in (name, *of_rows(rows, **options))]
    assert_shown("data/forms", "\n".join(lines))


def test_fields_that_a_table_fills_up_are_no_fields() -> None:
    # transformers drops them too since 5.24; a template must not see them in any version.
    found = content_of({"messages": [{**SAID[0], "tool_calls": None, "name": None}]}, "text", "row 1")
    assert not isinstance(found, str) and found.messages == SAID[:1]


def test_a_count_stays_what_it_is_if_the_text_is_read_twice(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": f"line {number} of a text"} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, *[{"text": None}] * 9])))
    domains = {"mine": Domain(files=(str(tmp_path / "a.jsonl"),))}
    asked = (Calibration(domains=domains, sequence_length=8), 500, tiny_tokenizer(), 0)
    # More than there is to judge on: the text is read to its end, and again without.
    split = split_text(*asked, num_judged_tokens=10_000)
    assert split.learning.text.notes[0] == "domain 'mine': rows left out, since they hold no text: 9."
    assert split.judged.notes[0].startswith("domain 'mine': too short for a part that only judges")


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


FILES = {name: f"text of {name}" for name in ("b.py", "a.md", "deep/er/c.txt", ".hidden.txt", ".git/d.txt", "e.bin")}
FILES |= {
    "deep/empty.py": "",
    "odd[1].txt": "brackets",
    "rows.jsonl": '{"text": "a row"}\n',
    "null.jsonl": '{"text": null}',
}
FILES |= {f"kinds/a{suffix}": f"# one\n\nof {suffix}\n" for suffix in (".md", ".py", ".rs", ".PY", ".tex.gz")}
FILES |= {
    "tables/a.tsv": 'id\ttext\n1\tone, two\n2\t"Stop" he said\n3\tan " inch\n',
    "tables/a.csv": "id,text\n1,x\n2\n3,\n",
}
PATTERNS = [
    "deep",
    "*.md **/*.txt",
    "odd[1].txt",
    "*.rst",
    "**/nothing",
    "*.bin",
    "deep/e*.py",
    "rows.jsonl null.jsonl",
]
PATTERNS += ["kinds", "tables/a.tsv", "tables/a.csv", "~/a.md", "~/deep"]


def test_which_files_are_read_and_what_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a directory all but hidden ones; patterns name files at any depth; text and code of every kind are text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, text in FILES.items():
        data = text.encode()
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    lines = [line for names in PATTERNS for line in (names, *told(*names.split()))]
    Path("null.jsonl").unlink()  # in a directory it is a mistake, too
    assert_shown("data/files", "\n".join([*lines, "all", *told(".")]))


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
