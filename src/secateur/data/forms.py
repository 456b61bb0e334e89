"""Rows as people have them, a text or a chat in one of several forms, as one thing each; and a chat
as text.

In: a row and the column asked for. Out: its text, or a `Chat`, of which the tokenizer's template
makes text. A row without either raises NoText, which is counted where other rows hold some. A
template is a program from the checkpoint; jinja's sandbox keeps it from everything but the
messages.
"""

from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from types import SimpleNamespace
from typing import Any, NamedTuple

from transformers.utils import chat_template_utils

from secateur.errors import CalibrationError, advice, shortened
from secateur.files import json_of
from secateur.model.stock import BAD_VALUE, Tokenizer, replaced

# Gets what happened to a row or file, in words such as these, and where that is.
Note = Callable[[str, str], None]
Message = dict[str, Any]
Messages = list[Message]

NULL = "rows left out, since they hold no text"
NO_USER = "chats left out, since no user says anything in them"
PARTS = "chats read without their parts that are no text, such as images"


def unheard(what: str, where: str) -> None:
    """Note nothing."""


class Notes:
    """What was noted of each domain's rows and files. One that is read twice counts once."""

    def __init__(self) -> None:
        self._places: defaultdict[tuple[str, str], set[str]] = defaultdict(set)

    def of(self, domain: str) -> Note:
        """Return where to note what happens in a domain."""
        return lambda what, where: self._places[domain, what].add(where)

    def sentences(self) -> tuple[str, ...]:
        """Return a sentence per domain and thing that happened, with its count."""
        return tuple(
            f"domain '{name}': {what}: {len(places):,}."
            for (name, what), places in self._places.items()
        )


class NoText(CalibrationError):
    """A row or a file holds no text that can be used. `what`: how notes count it."""

    def __init__(self, sentence: str, what: str = NULL) -> None:
        super().__init__(sentence)
        self.what = what


class Chat(NamedTuple):
    """What a chat template takes. `tools`: as JSON schemas of functions, or None."""

    messages: Messages
    tools: Messages | None = None


# A row's fields that are a chat, if no column of text is asked for: a list of messages, or a prompt
# and its answer. The first form of which no field is null counts.
CHATS = ("messages", "conversations", "conversation")
FORMS: tuple[tuple[str, ...], ...] = (
    *((name,) for name in CHATS),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("chosen",),
)
# What belongs to the instruction, what stands before the chat, and what is said of no list of
# turns.
INPUT_FIELDS, SYSTEM_FIELDS = ("input", "context"), ("system", "system_prompt")
NO_MESSAGES = "messages must be a list of objects with role and content."
# How templates call the roles of other tools.
ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
}


def content_of(
    row: Any, column: str, where: str, note: Note = unheard, *, answered: bool = False
) -> str | Chat:
    """Return a row's text or chat; with the column `text` a chat is found by its fields, see
    `FORMS`.

    `answered`: the model is to answer it, so a prompt without an answer will do.

    Raises NoText if it holds neither, CalibrationError, naming `where`, if it is not what it
    should.
    """
    if not isinstance(row, dict):
        return _text(row, where)
    form = (column,)
    if row.get(column) is None and column == "text":
        needed = slice(1 if answered else None)
        form = next(
            (fields for fields in FORMS if all(row.get(key) is not None for key in fields[needed])),
            form,
        )
    first, *answer = (row.get(key) for key in form)
    if first is None:
        raise _without(row, column, where)
    if form[0] in CHATS:
        first = _parsed(first)  # tables without lists hold JSON
    if not answer and not isinstance(first, list):
        if form[0] in CHATS:
            raise CalibrationError(f"{where}: {NO_MESSAGES}")
        return _text(first, where)
    messages = _messages(first, where, note)
    if answer:
        is_needed = not answered or _are_objects(answer[0])
        given = _messages(answer[0], where, note, "assistant") if is_needed else []
        messages = _pair(row, messages, given)
    system = next((row[name] for name in SYSTEM_FIELDS if row.get(name)), None)
    if system is not None and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(system, where)}, *messages]
    if not any(message["content"] or message.get("tool_calls") for message in messages):
        raise NoText(f"{where}: its messages hold no text.")
    return Chat(messages, _tools(row.get("tools"), where))


def prompt_of(content: str | Chat, where: str) -> Chat:
    """Return a row up to the end of its first user's turn; a text is that turn. Raises NoText
    without one.
    """
    if isinstance(content, str):
        messages = [{"role": "user", "content": content}]
        if not content.strip():
            raise NoText(f"{where}: the prompt is blank.")
        return Chat(messages)
    first = next(
        (place for place, turn in enumerate(content.messages) if turn["role"] == "user"), None
    )
    if first is None or not content.messages[first]["content"].strip():
        raise NoText(f"{where}: no user says anything in it.", NO_USER)
    systems = [turn for turn in content.messages[:first] if turn["role"] == "system"]
    return Chat([*systems, content.messages[first]], content.tools)


def _text(value: Any, where: str) -> str:
    if value is None:
        raise NoText(f"{where}: it is null.")
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: the text must be a string, got {type(value).__name__}.")
    return value


def _without(row: dict[Any, Any], column: str, where: str) -> NoText:
    columns = [str(name) for name in row if name]
    there = f"there are: {shortened(', '.join(columns)) or 'none'}"
    if column in row or any(
        all(name in row for name in form) for form in FORMS if column == "text"
    ):
        return NoText(f"{where}: its text is null; {there}; set `column` to one that holds text.")
    return NoText(
        f"{where}: no column '{column}'; {there}; "
        f"{advice(column, columns, 'set `column` to one of them.')}"
    )


def _pair(row: dict[Any, Any], prompt: Messages, answer: Messages) -> Messages:
    if answer and answer[0]["role"] != "assistant":  # a whole chat, which begins with the prompt
        return answer
    more = next(
        (
            row[name]
            for name in INPUT_FIELDS
            if isinstance(row.get(name), str) and row[name].strip()
        ),
        None,
    )
    if more is not None and prompt and "instruction" in row:
        prompt[-1]["content"] += f"\n\n{more}"
    return prompt + answer


def _messages(value: Any, where: str, note: Note, role: str = "user") -> Messages:
    """Return a list of turns, or a text of the given role, as messages."""
    if not isinstance(value, list):
        return [{"role": role, "content": _text(value, where)}]
    if not _are_objects(value):
        raise CalibrationError(f"{where}: {NO_MESSAGES}")
    return [_message(turn, where, note) for turn in value]


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _message(turn: Message, where: str, note: Note) -> Message:
    """Return a turn with a role that templates know, its content as text, and its calls as
    objects.
    """
    # Tables fill fields up with null.
    rest = {key: value for key, value in turn.items() if value is not None}
    role = rest.pop("role", rest.pop("from", None))
    content = rest.pop("content", rest.pop("value", None))
    if role is None:
        raise CalibrationError(f"{where}: {NO_MESSAGES}")
    calls = rest.pop("tool_calls", None) or [
        call for call in [rest.pop("function_call", None)] if call
    ]
    if role == "function_call" and (parsed := _parsed(content)) is not content:
        calls, content = parsed if isinstance(parsed, list) else [parsed], None
    if not _are_objects(calls):
        raise CalibrationError(f"{where}: tool_calls must be a list of objects with a function.")
    message = {
        "role": ROLES.get(str(role).lower(), role),
        "content": _joined(content, where, note),
        **rest,
    }
    return {**message, "tool_calls": [_call(call) for call in calls]} if calls else message


def _joined(content: Any, where: str, note: Note) -> str:
    """Return a message's content as text; parts of other kinds are left out and noted."""
    if not isinstance(content, list):
        return "" if content is None else _text(content, where)
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        note(PARTS, where)
    return "".join(text for text in texts if isinstance(text, str))


def _call(call: Message) -> Message:
    """Return a call as templates read it: a function with its arguments as an object, not as
    JSON.
    """
    inner = call.get("function")
    rest, function = (call, inner) if isinstance(inner, dict) else ({}, call)
    function = {
        key: _parsed(value) if key == "arguments" else value for key, value in function.items()
    }
    return {"type": "function", **rest, "function": function}


def _tools(value: Any, where: str) -> Messages | None:
    tools = _parsed(value) or None
    if tools is None:
        return None
    if not _are_objects(tools):
        raise CalibrationError(f"{where}: tools must be a list of objects.")
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]


def _parsed(value: Any) -> Any:
    """Return what a text of JSON says, if it is an object or a list; else the value."""
    try:
        parsed = json_of(value) if isinstance(value, str) else None
    except ValueError:  # a text as any other
        return value
    return parsed if isinstance(parsed, dict | list) else value


# What templates that ask for the date are told, so that the same chat is the same text on any day:
# the date that Llama 3.1's writes where it cannot ask.
TODAY = datetime(2024, 7, 26)
CLOCK = "datetime"  # of which a template's `strftime_now` asks `now`
# Stands for what a user says.
MARK = "secateur"

REFUSED_CHATS = "chats left out, since the chat template refuses them"
JOINED_CHATS = (
    "chats whose system message stands in the first user's, since the chat template refuses it"
)


def chat_text(
    messages: Messages,
    tokenizer: Tokenizer,
    where: str,
    tools: Messages | None = None,
    note: Note = unheard,
    *,
    answered: bool = False,
) -> str:
    """Return the chat as the template writes it, with `answered` up to where the model answers.

    A model that reasons where it is asked to is asked to.

    Where the template refuses a system message, its text comes before that of the first user.
    Raises NoText if the template refuses the chat all the same, CalibrationError for other errors.
    """
    if tokenizer.chat_template is None:
        raise CalibrationError(
            f"{where}: a chat, but the tokenizer has no chat template; set `column` to one that "
            "holds text."
        )
    try:
        return _rendered(messages, tokenizer, where, tools, answered=answered)
    except NoText:
        if [message["role"] for message in messages[:2]] != ["system", "user"]:
            raise
        system, user, *rest = messages
        joined = {**user, "content": f"{system['content']}\n\n{user['content']}"}
        text = _rendered([joined, *rest], tokenizer, where, tools, answered=answered)
    note(JOINED_CHATS, where)
    return text


def closing_of_turn(tokenizer: Tokenizer) -> str:
    """Return what the template writes between a user's turn and the answer.

    Raises CalibrationError if the template does not write what a user says.
    """
    text = chat_text([{"role": "user", "content": MARK}], tokenizer, "a user's turn", answered=True)
    _, mark, closing = text.partition(MARK)
    if not mark:
        raise CalibrationError(
            "the chat template: it does not write what a user says; give text in place of answers."
        )
    return closing


def _rendered(
    messages: Messages, tokenizer: Tokenizer, where: str, tools: Any, *, answered: bool
) -> str:
    from jinja2 import TemplateError

    try:
        how: dict[str, Any] = {"tools": tools, "add_generation_prompt": answered}
        if answered:
            how["enable_thinking"] = True
        with replaced(vars(chat_template_utils), CLOCK, SimpleNamespace(now=lambda: TODAY)):
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **how))
    except (TemplateError, NameError, *BAD_VALUE) as error:  # a program may raise any of these
        reason = f"{error}" or type(error).__name__
        sentence = f"{where}: the tokenizer's chat template refuses it ({reason}); correct it."
        # By its own `raise_exception`, which says what it does not take.
        if type(error) is TemplateError:
            raise NoText(sentence, REFUSED_CHATS) from None
        raise CalibrationError(sentence) from None
