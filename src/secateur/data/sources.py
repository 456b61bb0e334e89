"""From a calibration domain to its documents, one by one, in an order that the seed decides."""

import csv
import glob
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol, runtime_checkable

from huggingface_hub import constants
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx or httpx2
)

from secateur.data.chat import chat_text
from secateur.data.forms import Note, NoText, content_of, unheard
from secateur.data.installed_text import installed_documents
from secateur.errors import CalibrationError
from secateur.files import json_of
from secateur.model.checkpoint import Tokenizer
from secateur.plugins import SOURCE_GROUP, look_up

MIN_TXT_DOCUMENT_CHARACTERS = 8000
MAX_CSV_FIELD_CHARACTERS = 2**31 - 1  # the largest that csv accepts on every platform

Rows = list[tuple[str, Any]]


def read_rows(path: Path) -> Rows:
    """Return the rows of a file; a text is cut into documents at line boundaries.

    Raises CalibrationError, naming the file and if possible the line or byte, if it is missing,
    empty, not UTF-8, broken or of an unknown format.
    """
    where = f"calibration file {path}"
    path = path.expanduser()
    if not path.is_file():
        raise CalibrationError(f"{where}: there is no such file; paths are relative to the working directory.")
    suffix, ending = _suffixes(path)
    if ending == ".parquet":
        rows = _parquet_rows(path, where)
    elif suffix in _READERS:
        rows = _READERS[suffix](_text(path, where), where)
    else:
        tables = ", ".join(suffix for suffix in _READERS if suffix not in TEXT_SUFFIXES)
        raise CalibrationError(
            f"{where}: unknown suffix '{ending}'; allowed: {tables}, text and code (.txt, .md, .py and more), all of "
            "these also with .gz, and .parquet."
        )
    if not rows:
        raise NoText(f"{where}: it is empty; give a file with text in it.", EMPTY_FILES)
    return rows


def _suffixes(path: Path) -> tuple[str, str]:
    """Return a file's suffix without and with `.gz`."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix, f"{suffix}.gz" if name.endswith(".gz") else suffix


def files_at(place: str) -> tuple[list[Path], bool]:
    """Return the files that a path, a directory or a pattern names, sorted, and whether it names one.

    Hidden files and directories are left out. Raises CalibrationError if there is no file.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if not any(part[0] == "." for part in file.relative_to(path).parts)]
    elif glob.has_magic(place) and not path.exists():
        found = [Path(file) for file in glob.iglob(str(path), recursive=True)]
    else:
        return [path], True
    if not (files := sorted(file for file in found if file.is_file())):
        raise CalibrationError(f"calibration files {place}: there is no file there; hidden ones do not count.")
    return files, False


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


def _csv_rows(text: str, where: str, **dialect: Any) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, **dialect)
    limit = csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    try:
        return [(f"{where}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise CalibrationError(f"{where}, line {reader.line_num}: not valid CSV ({error}); correct it.") from None
    finally:
        csv.field_size_limit(limit)


def _tsv_rows(text: str, where: str) -> Rows:
    try:
        return _csv_rows(text, where, delimiter="\t")
    except CalibrationError:  # quotes that do not pair: many such files quote nothing
        return _csv_rows(text, where, delimiter="\t", quoting=csv.QUOTE_NONE)


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


TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .adoc .log .html .htm .xml .css .scss .toml .ini .cfg .yaml .yml "
    ".py .pyi .ipynb .r .jl .m .f90 .c .h .cc .cpp .cxx .hpp .cu .cuh .rs .go .zig .java .kt .scala .groovy .cs .fs "
    ".swift .js .mjs .jsx .ts .tsx .vue .php .rb .pl .lua .dart .ex .exs .erl .clj .hs .ml .lean .sql .proto "
    ".sh .bash .ps1 .bat .cmake .mk .tf .diff .patch".split()
)
_READERS: dict[str, Callable[[str, str], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    **dict.fromkeys(sorted(TEXT_SUFFIXES), _txt_rows),
}


@runtime_checkable
class DomainText(Protocol):
    """The source of one domain's text, and what to read from it."""

    sampled: bool
    config: str | None
    revision: str | None
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
    """A `datasets` hub id with its configuration, split and revision."""

    dataset: str
    config: str | None
    split: str
    revision: str | None


class Files(NamedTuple):
    """Paths, directories and patterns, and the column to read. `note`: gets what is left out."""

    places: tuple[str, ...]
    column: str = "text"
    note: Note = unheard


# A domain's other keys, which no source may use as its name.
OTHER_KEYS = ("sampled", "config", "revision", "split", "column", "share", "protect")
# From the user's value and a random order (by seed and domain) to documents or rows.
Source = Callable[[Any, Random], Iterable[str | dict[str, Any] | Row]]
# So many rows without text at the beginning, and there will be none.
PATIENCE = 200
OTHER_FILES = "files left out, since files of their kind are not read"
EMPTY_FILES = "files left out, since they hold no text"


def documents(name: str, domain: DomainText, tokenizer: Tokenizer, seed: int, note: Note = unheard) -> Iterator[str]:
    """Yield the documents of the domain `name`, shuffled by seed and name, without blank ones.

    `note`: gets what happened to every row or file that is left out or changed.

    Raises CalibrationError, while iterating, for text that is missing, unreadable or not text;
    PluginError if a package registers an unusable source.
    """
    key, value = domain.source
    if key == "dataset":
        value = HubDataset(value, domain.config, domain.split, domain.revision)
    elif key == "files":
        value = Files(value, domain.column, note)
    read = look_up(SOURCE_GROUP, key, SOURCES, callable, "a function of a value and a random order", OTHER_KEYS)
    problem: NoText | None = None
    num_usable = 0
    for number, row in enumerate(read(value, Random(f"{seed}:{name}")), start=1):
        where, content = row if isinstance(row, Row) else (f"domain '{name}', document {number}", row)
        try:
            text = _row_text(content, domain.column, tokenizer, where, note)
        except NoText as error:
            problem = problem or error
            note(error.what, where)
            if num_usable == 0 and number >= PATIENCE:
                break
            continue
        if text.strip():
            num_usable += 1
            yield text
    if problem is not None and num_usable == 0:
        raise problem


def file_rows(wanted: Files, order: Random) -> Iterator[Row]:
    """Yield the rows of all files, shuffled together.

    Raises CalibrationError for a bad file; NoText for a named one without a row that has text, or if
    no file of a directory or pattern has any.
    """
    rows: list[Row] = []
    for place in wanted.places:
        files, is_named = files_at(place)
        known = [file for file in files if is_named or _is_known(file)]
        for file in set(files).difference(known):
            wanted.note(OTHER_FILES, str(file))
        found, problem = len(rows), None
        for file in known:
            try:
                rows += _rows_with_text(file, wanted.column)
            except NoText as error:
                problem = problem or error
                wanted.note(EMPTY_FILES, str(file))
        if len(rows) == found:
            raise problem or CalibrationError(f"calibration files {place}: there is no file of a kind that is read.")
    order.shuffle(rows)
    yield from rows


def _is_known(path: Path) -> bool:
    suffix, ending = _suffixes(path)
    return suffix in _READERS or ending == ".parquet"


def _rows_with_text(path: Path, column: str) -> list[Row]:
    """Return a file's rows. Raises NoText, with the fields of the first, if none of them has text."""
    rows, problem = read_rows(path), None
    for where, row in rows:
        try:
            content = content_of(row, column, where)
        except NoText as error:
            problem = problem or error
            continue
        if not isinstance(content, str) or content.strip():
            return [Row(*row) for row in rows]
    blank = f"calibration file {path}: column '{column}' is blank in every row; set `column` to one that holds text."
    raise problem or NoText(blank)


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
        name, config, split, revision = wanted
        rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
        for number, row in enumerate(rows.shuffle(seed=order.getrandbits(32)), start=1):
            yield Row(f"{where}, row {number} of its shuffled order", row)
    except (OSError, ValueError, RuntimeError, DatasetsError, HTTPError) as error:
        reason = " ".join(str(error).split())
        advice = "check its id, config, revision and split, and the network"
        if offline:
            fill = "load it once with datasets.load_dataset while online to fill the local cache"
            advice = f"HF_HUB_OFFLINE=1 forbids the network, so {fill}, or give its text as files"
        raise CalibrationError(f"{where}: cannot be loaded ({reason}); {advice}.") from None


# Without `sampled`: the model writes that text, see `sampled.sample_blocks`.
SOURCES: dict[str, Source] = {"installed": installed_documents, "files": file_rows, "dataset": dataset_rows}


def _row_text(row: Any, column: str, tokenizer: Tokenizer, where: str, note: Note) -> str:
    content = content_of(row, column, where, note)
    text = content if isinstance(content, str) else chat_text(content.messages, tokenizer, where, content.tools, note)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape what UTF-8 cannot hold
        raise CalibrationError(f"{where}: the text holds half of a surrogate pair; remove it.") from None
    return text
