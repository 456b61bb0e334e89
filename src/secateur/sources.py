"""A calibration domain to its documents, one by one, in an order that follows from the seed alone.

In: a domain, whose key says which of `SOURCES` reads it. Out: an iterator of documents (str).
Here is decided which part of a row is text; packing and tokenising are `calibration`'s. Packages add sources:
docs/extend.md.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol, runtime_checkable

from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase

from secateur.errors import CalibrationError, nearest
from secateur.installed_text import installed_documents
from secateur.plugins import SOURCE_GROUP, look_up
from secateur.text_files import read_rows


@runtime_checkable
class DomainText(Protocol):
    """Where one domain's text comes from, and what of it is read."""

    sampled: bool
    config: str | None
    split: str
    column: str
    share: float

    @property
    def source(self) -> tuple[str, Any]:
        """Return the source's key and what the user wrote there."""
        ...


class Row(NamedTuple):
    """What a source gives: a document, or a mapping of columns, one of which is text. `where`: for errors."""

    where: str
    content: Any


class HubDataset(NamedTuple):
    """A `datasets` hub id with its configuration and split."""

    dataset: str
    config: str | None
    split: str


# What else a domain may say, so that no package can take these for the name of a source.
OTHER_KEYS = ("sampled", "config", "split", "column", "share", "protect")
# What the user wrote, and the random order that follows from recipe seed and domain, to documents or rows of columns.
Source = Callable[[Any, Random], Iterable[str | dict[str, Any] | Row]]


def documents(name: str, domain: DomainText, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[str]:
    """Yield the documents of the domain called `name`, shuffled by seed and name; blank ones are left out.

    Raises CalibrationError, while iterating, for text that is missing, unreadable or not text; PluginError if an
    installed package registers a source that cannot be used.
    """
    key, value = domain.source
    if key == "dataset":
        value = HubDataset(value, domain.config, domain.split)
    read = look_up(SOURCE_GROUP, key, SOURCES, callable, "a function of a value and a random order", OTHER_KEYS)
    for number, row in enumerate(read(value, Random(f"{seed}:{name}")), start=1):
        where, content = row if isinstance(row, Row) else (f"domain '{name}', document {number}", row)
        text = _row_text(content, domain.column, tokenizer, where)
        if text.strip():
            yield text


def file_rows(files: tuple[str, ...], order: Random) -> Iterator[Row]:
    """Yield the rows of all files, shuffled together. Raises CalibrationError for a file that cannot be read."""
    rows = [Row(*row) for file in files for row in read_rows(Path(file))]
    order.shuffle(rows)
    yield from rows


def dataset_rows(wanted: HubDataset, order: Random) -> Iterator[Row]:
    """Yield the rows of a `datasets` hub id, streamed where there is a network. Raises CalibrationError."""
    where, offline = f"dataset {wanted.dataset}", constants.HF_HUB_OFFLINE
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise CalibrationError(f"{where}: needs the package datasets; install secateur[data].") from None
    try:
        if offline:  # streaming never looks into the local cache, which is all there is now
            rows = datasets.load_dataset(*wanted[:2], split=wanted.split)
        else:
            rows = datasets.load_dataset(*wanted[:2], split=wanted.split, streaming=True)
        for number, row in enumerate(rows.shuffle(seed=order.getrandbits(32)), start=1):
            yield Row(f"{where}, row {number} of its shuffled order", row)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        advice = "check its id, config and split, and the network"
        if offline:
            advice = (
                "HF_HUB_OFFLINE=1 forbids the network, so load it once with datasets.load_dataset while online to fill "
                "the local cache, or give its text as files"
            )
        raise CalibrationError(f"{where}: cannot be loaded ({reason}); {advice}.") from None


# `sampled` is not among them: the model writes that text, see `calibration_sampled`.
SOURCES: dict[str, Source] = {"installed": installed_documents, "files": file_rows, "dataset": dataset_rows}


def _row_text(row: Any, column: str, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if isinstance(row, dict):
        chat = column == "messages" or (column == "text" and "text" not in row and "messages" in row)
        key = "messages" if chat else column
        if key not in row:
            columns = [str(name) for name in row if name]
            raise CalibrationError(
                f"{where}: no column '{key}'; there are: {', '.join(columns) or 'none'}; "
                f"set `column`, perhaps to '{nearest(key, columns)}'."
            )
        row = _chat_text(row[key], tokenizer, where) if chat else row[key]
    if not isinstance(row, str):
        raise CalibrationError(f"{where}: the text must be a string, got {type(row).__name__}.")
    try:
        row.encode()
    except UnicodeEncodeError:  # JSON can escape what UTF-8 cannot hold
        raise CalibrationError(f"{where}: the text holds half of a surrogate pair; remove it.") from None
    return row


def _chat_text(messages: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    from jinja2 import TemplateError

    if not isinstance(messages, list) or not all(isinstance(each, dict) and "role" in each for each in messages):
        raise CalibrationError(f"{where}: messages must be a list of objects with role and content.")
    if tokenizer.chat_template is None:
        raise CalibrationError(
            f"{where}: the row is a chat, but the tokenizer has no chat template; give rows with a text column."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError) as error:
        raise CalibrationError(f"{where}: the tokenizer's chat template refuses it ({error}); correct it.") from None
