"""A calibration domain to its documents, one by one, in an order that follows from the seed alone.

In: a domain (installed text, local files, or a `datasets` hub id). Out: an iterator of documents (str).
Here is decided which part of a row is text; packing and tokenising are `calibration`'s.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase

from secateur.errors import CalibrationError, nearest
from secateur.installed_text import installed_documents
from secateur.text_files import read_rows


@runtime_checkable
class DomainText(Protocol):
    """Where one domain's text comes from: exactly one source, and what of it is read."""

    files: tuple[str, ...] | None
    dataset: str | None
    sampled: bool
    config: str | None
    split: str
    column: str
    share: float

    @property
    def installed(self) -> str | None:
        """The name of an installed text."""
        ...


def documents(name: str, domain: DomainText, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[str]:
    """Yield the documents of the domain called `name`, shuffled by seed and name; blank ones are left out.

    Raises CalibrationError, while iterating, for text that is missing, unreadable or not text.
    """
    order = Random(f"{seed}:{name}")
    if domain.installed is not None:
        yield from installed_documents(domain.installed, order)
        return
    rows = _file_rows(domain.files, order) if domain.files else _dataset_rows(domain, order)
    for where, row in rows:
        text = _row_text(row, domain.column, tokenizer, where)
        if text.strip():
            yield text


def _file_rows(files: tuple[str, ...], order: Random) -> Iterator[tuple[str, Any]]:
    rows = [row for file in files for row in read_rows(Path(file))]
    order.shuffle(rows)
    yield from rows


def _dataset_rows(domain: DomainText, order: Random) -> Iterator[tuple[str, Any]]:
    where, offline = f"dataset {domain.dataset}", constants.HF_HUB_OFFLINE
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise CalibrationError(f"{where}: needs the package datasets; install secateur[data].") from None
    try:
        if offline:  # streaming never looks into the local cache, which is all there is now
            rows = datasets.load_dataset(str(domain.dataset), domain.config, split=domain.split)
        else:
            rows = datasets.load_dataset(str(domain.dataset), domain.config, split=domain.split, streaming=True)
        for number, row in enumerate(rows.shuffle(seed=order.getrandbits(32)), start=1):
            yield f"{where}, row {number} of its shuffled order", row
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        advice = "check its id, config and split, and the network"
        if offline:
            advice = (
                "HF_HUB_OFFLINE=1 forbids the network, so load it once with datasets.load_dataset while online to fill "
                "the local cache, or give its text as files"
            )
        raise CalibrationError(f"{where}: cannot be loaded ({reason}); {advice}.") from None


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
