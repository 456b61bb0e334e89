"""A chat as text: by the tokenizer's template, a program from the checkpoint.

In: messages and a tokenizer. Out: text, or a CalibrationError. jinja's sandbox keeps a template from
everything but the messages.
"""

from datetime import datetime
from types import SimpleNamespace
from typing import Any

from transformers.utils import chat_template_utils

from secateur.data.forms import Messages, Note, NoText, unheard
from secateur.errors import CalibrationError
from secateur.model.stock import Tokenizer, replaced

# What templates that ask for the date are told, so that the same chat is the same text on any day: the
# date that Llama 3.1's writes where it cannot ask.
TODAY = datetime(2024, 7, 26)
CLOCK = "datetime"  # of which a template's `strftime_now` asks `now`
# Stands for what a user says.
MARK = "secateur"

REFUSED = "chats left out, since the chat template refuses them"
SYSTEM = "chats whose system message stands in the first user's, since the chat template refuses it"


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
        if [message["role"] for message in messages[:2]] != ["system", "user"]:
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


def _rendered(messages: Messages, tokenizer: Tokenizer, where: str, tools: Any, *, answered: bool) -> str:
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
        how: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": True} if answered else {}
        with replaced(vars(chat_template_utils), CLOCK, SimpleNamespace(now=lambda: TODAY)):
            return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **how))
    except (*raised, MemoryError) as error:  # a program may raise any of these
        reason = f"{error}" or type(error).__name__
        sentence = f"{where}: the tokenizer's chat template refuses it ({reason}); correct it."
        if type(error) is TemplateError:  # by its own `raise_exception`, which says what it does not take
            raise NoText(sentence, REFUSED) from None
        raise CalibrationError(sentence) from None
