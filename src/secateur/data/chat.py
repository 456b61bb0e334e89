"""A chat as text: by the tokenizer's template, a program from the checkpoint, within limits.

In: messages and a tokenizer. Out: text, or a CalibrationError. jinja's sandbox keeps a template from
everything but the messages. Its work is bounded here.
"""

import sys
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from secateur.data.forms import Note, NoText, unheard
from secateur.errors import CalibrationError
from secateur.model.checkpoint import Tokenizer

# Lines of Python, a few seconds. Compiling a long template takes a tenth, a chat a thousandth.
MAX_STEPS = 10_000_000
# Characters, items or bits that one multiplication or power may give.
MAX_PRODUCT = 10_000_000
# What templates that ask for the date are told, so that the same chat is the same text on any day: the
# date that Llama 3.1's writes where it cannot ask.
TODAY = datetime(2024, 7, 26)
CLOCK = "transformers.utils.chat_template_utils.datetime"  # of which `strftime_now` asks `now`


# Stands for what a user says.
MARK = "secateur"

REFUSED = "chats left out, since the chat template refuses them"
SYSTEM = "chats whose system message stands in the first user's, since the chat template refuses it"


def chat_text(
    messages: list[dict[str, Any]],
    tokenizer: Tokenizer,
    where: str,
    tools: list[dict[str, Any]] | None = None,
    note: Note = unheard,
    *,
    answered: bool = False,
) -> str:
    """Return the chat as the template writes it, with `answered` up to where the model answers.

    A model that reasons where it is asked to is asked to.

    Where the template refuses a system message, its text comes before that of the first user. Raises
    NoText if the template refuses the chat all the same, CalibrationError for other errors.
    """
    if tokenizer.chat_template is None:
        raise CalibrationError(
            f"{where}: a chat, but the tokenizer has no chat template; set `column` to one that holds text."
        )
    try:
        return _rendered(messages, tokenizer, where, tools, answered=answered)
    except NoText:
        if [each["role"] for each in messages[:2]] != ["system", "user"]:
            raise
        system, user, *rest = messages
        joined = {**user, "content": f"{system['content']}\n\n{user['content']}"}
        text = _rendered([joined, *rest], tokenizer, where, tools, answered=answered)
    note(SYSTEM, where)
    return text


def closing_of_turn(tokenizer: Tokenizer) -> str:
    """Return what the template writes between a user's turn and the answer.

    Raises CalibrationError if the template does not write what a user says.
    """
    text = chat_text([{"role": "user", "content": MARK}], tokenizer, "the chat template", answered=True)
    _, mark, closing = text.partition(MARK)
    if not mark:
        raise CalibrationError("the chat template: it does not write what a user says; give text in place of answers.")
    return closing


def _rendered(messages: list[dict[str, Any]], tokenizer: Tokenizer, where: str, tools: Any, *, answered: bool) -> str:
    from jinja2 import TemplateError

    raised = (
        TemplateError,
        ArithmeticError,
        LookupError,
        AttributeError,
        NameError,
        TypeError,
        ValueError,
        RuntimeError,
    )
    try:
        with _bounded_products(), patch(CLOCK, SimpleNamespace(now=lambda: TODAY)), _bounded_steps():
            how: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": True} if answered else {}
            return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **how))
    except (*raised, MemoryError) as error:  # a program may raise any of these
        reason = f"{error}" or type(error).__name__
        sentence = f"{where}: the tokenizer's chat template refuses it ({reason}); correct it."
        if type(error) is TemplateError:  # by its own `raise_exception`, which says what it does not take
            raise NoText(sentence, REFUSED) from None
        raise CalibrationError(sentence) from None


@contextmanager
def _bounded_steps() -> Iterator[None]:
    """Raise RuntimeError within the block once it has run `MAX_STEPS` lines of Python."""
    num_left, before = MAX_STEPS, sys.gettrace()

    def count(*_: Any) -> Any:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise RuntimeError(f"it takes more than {MAX_STEPS:,} steps")
        return count

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _bounded_products() -> Iterator[None]:
    """Let templates that are compiled within the block raise ValueError for `10 ** 10 ** 10`.

    No count of steps bounds such an operation, since it is one.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

    def call_binop(self: SandboxedEnvironment, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _product_size(operator, left, right) > MAX_PRODUCT:
            raise ValueError(f"{operator} would give more than {MAX_PRODUCT:,} characters or bits")
        return SandboxedEnvironment.call_binop(self, context, operator, left, right)

    changes: dict[str, Any] = {"intercepted_binops": frozenset({"*", "**"}), "call_binop": call_binop}
    with patch.multiple(ImmutableSandboxedEnvironment, **changes):
        yield


def _product_size(operator: str, left: Any, right: Any) -> int | float:
    """Return the bits of a product or power of integers, or the length of a repeated text or list."""
    bits, lengths = [], []
    for value in (left, right):
        bits.append(value.bit_length() if isinstance(value, int) else 0)
        lengths.append(len(value) if isinstance(value, Sized) else 0)
    if operator == "**":
        return bits[0] * right if isinstance(right, int | float) else 0
    repeated = (length * times for length, times in zip(lengths, (right, left), strict=True) if isinstance(times, int))
    return max(sum(bits) if all(bits) else 0, *repeated, 0)
