"""From a calibration domain to its documents, one by one, in an order that the seed decides."""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol, runtime_checkable

from huggingface_hub import constants

from secateur.data.chat import chat_text
from secateur.data.installed_text import installed_documents
from secateur.errors import CalibrationError, advice
from secateur.files import json_of
from secateur.model.checkpoint import Tokenizer
from secateur.plugins import SOURCE_GROUP, look_up

MIN_TXT_DOCUMENT_CHARACTERS = 8000
MAX_CSV_FIELD_CHARACTERS = 2**31 - 1  # the largest that csv accepts on every platform

Rows = list[tuple[str, Any]]


def read_rows(path: Path) -> Rows:
    """Return the rows of a file.

    Raises CalibrationError, naming the file and if possible the line or byte, if it is missing,
    empty, not UTF-8, broken or of an unknown format.
    """
    where = f"calibration file {path}"
    if not path.is_file():
        raise CalibrationError(f"{where}: there is no such file; paths are relative to the working directory.")
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    ending = f"{suffix}.gz" if name.endswith(".gz") else suffix
    if ending == ".parquet":
        rows = _parquet_rows(path, where)
    elif suffix in _READERS:
        rows = _READERS[suffix](_text(path, where), where)
    else:
        allowed = ", ".join([*_READERS, *(f"{known}.gz" for known in _READERS), ".parquet"])
        raise CalibrationError(f"{where}: unknown suffix '{ending}'; allowed: {allowed}.")
    if not rows:
        raise CalibrationError(f"{where}: it is empty; give a file with text in it.")
    return rows


def _text(path: Path, where: str) -> str:
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{where}: not valid UTF-8 at byte {error.start}; convert the file to UTF-8.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CalibrationError(f"{where}: broken gzip ({error}); compress or download it again.") from None
    except OSError as error:
        raise CalibrationError(f"{where}: cannot be read ({error.strerror}); check its permissions.") from None


def _txt_rows(text: str, where: str) -> Rows:
    documents, lines, num_characters = [], [], 0
    for line in io.StringIO(text):
        lines.append(line)
        num_characters += len(line)
        if num_characters >= MIN_TXT_DOCUMENT_CHARACTERS:
            documents.append("".join(lines))
            lines, num_characters = [], 0
    documents.append("".join(lines))
    return [(where, document) for document in documents if document.strip()]


def _jsonl_rows(text: str, where: str) -> Rows:
    # Not splitlines: JSON strings may contain Unicode line separators.
    lines = [(f"{where}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
    return [(place, _parse_json(line, place)) for place, line in lines if line.strip()]


def _json_rows(text: str, where: str) -> Rows:
    data = _parse_json(text, where) if text.strip() else []
    lists = [value for value in data.values() if isinstance(value, list)] if isinstance(data, dict) else [data]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise CalibrationError(f"{where}: needs one list of objects or strings, at the top or under one key.")
    return [(f"{where}, row {number}", row) for number, row in enumerate(lists[0], start=1)]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json_of(text)
    except ValueError as error:
        raise CalibrationError(f"{where}: not valid JSON ({error}); correct or remove it.") from None


def _csv_rows(text: str, where: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    try:
        return [(f"{where}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise CalibrationError(f"{where}, line {reader.line_num}: not valid CSV ({error}); correct it.") from None
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path, where: str) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CalibrationError(f"{where}: reading parquet needs pyarrow; install secateur[data].") from None
    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist() if path.stat().st_size else []
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise CalibrationError(f"{where}: broken parquet ({reason}); write or download it again.") from None
    return [(f"{where}, row {number}", row) for number, row in enumerate(rows, start=1)]


_READERS = {".txt": _txt_rows, ".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}


@runtime_checkable
class DomainText(Protocol):
    """The source of one domain's text, and what to read from it."""

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
    """A document, or a mapping of columns, one of which is text. `where`: for errors."""

    where: str
    content: Any


class HubDataset(NamedTuple):
    """A `datasets` hub id with its configuration and split."""

    dataset: str
    config: str | None
    split: str


# A domain's other keys, which no source may use as its name.
OTHER_KEYS = ("sampled", "config", "split", "column", "share", "protect")
# From the user's value and a random order (by seed and domain) to documents or rows.
Source = Callable[[Any, Random], Iterable[str | dict[str, Any] | Row]]


def documents(name: str, domain: DomainText, tokenizer: Tokenizer, seed: int) -> Iterator[str]:
    """Yield the documents of the domain `name`, shuffled by seed and name, without blank ones.

    Raises CalibrationError, while iterating, for text that is missing, unreadable or not text;
    PluginError if a package registers an unusable source.
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
    """Yield the rows of all files, shuffled together. Raises CalibrationError for a bad file."""
    rows = [Row(*row) for file in files for row in read_rows(Path(file))]
    order.shuffle(rows)
    yield from rows


def dataset_rows(wanted: HubDataset, order: Random) -> Iterator[Row]:
    """Yield the rows of a `datasets` hub id, streamed while online. Raises CalibrationError."""
    where, offline = f"dataset {wanted.dataset}", constants.HF_HUB_OFFLINE
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise CalibrationError(f"{where}: needs the package datasets; install secateur[data].") from None
    try:
        streaming: Any = not offline  # streaming never reads the local cache
        rows = datasets.load_dataset(*wanted[:2], split=wanted.split, streaming=streaming)
        for number, row in enumerate(rows.shuffle(seed=order.getrandbits(32)), start=1):
            yield Row(f"{where}, row {number} of its shuffled order", row)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        advice = "check its id, config and split, and the network"
        if offline:
            fill = "load it once with datasets.load_dataset while online to fill the local cache"
            advice = f"HF_HUB_OFFLINE=1 forbids the network, so {fill}, or give its text as files"
        raise CalibrationError(f"{where}: cannot be loaded ({reason}); {advice}.") from None


# Without `sampled`: the model writes that text, see `calibration.sample_blocks`.
SOURCES: dict[str, Source] = {"installed": installed_documents, "files": file_rows, "dataset": dataset_rows}


def _row_text(row: Any, column: str, tokenizer: Tokenizer, where: str) -> str:
    if isinstance(row, dict):
        chat = column == "messages" or (column == "text" and "text" not in row and "messages" in row)
        key = "messages" if chat else column
        if key not in row:
            columns = [str(name) for name in row if name]
            hint = advice(key, columns, "set `column` to one of them.")
            raise CalibrationError(f"{where}: no column '{key}'; there are: {', '.join(columns) or 'none'}; {hint}")
        row = chat_text(row[key], tokenizer, where) if chat else row[key]
    if not isinstance(row, str):
        raise CalibrationError(f"{where}: the text must be a string, got {type(row).__name__}.")
    try:
        row.encode()
    except UnicodeEncodeError:  # JSON can escape what UTF-8 cannot hold
        raise CalibrationError(f"{where}: the text holds half of a surrogate pair; remove it.") from None
    return row
