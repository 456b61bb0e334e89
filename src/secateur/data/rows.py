"""From a file to its rows, as a stream: what is not asked for is not read."""

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from secateur.errors import CalibrationError, one_line
from secateur.files import json_of

MIN_TXT_DOCUMENT_CHARACTERS = 8000
PARQUET_ROWS = 16
# Characters of a field of a table.
MAX_FIELD = 2**24


class Row(NamedTuple):
    """A document, or a mapping of columns, one of which is text. `where`: for errors."""

    where: str
    content: Any


def read_rows(path: Path) -> Iterator[Row]:
    """Return the rows of a file; a text is cut into documents at line boundaries.

    Raises CalibrationError, naming the file and if possible the line, if it is missing, not UTF-8,
    broken or of an unknown format.
    """
    where = f"calibration file {path}"
    path = path.expanduser()
    if not path.is_file():
        raise CalibrationError(
            f"{where}: there is no such file; paths are relative to the working directory."
        )
    if not is_read(path):
        tables = ", ".join(suffix for suffix in _READERS if suffix not in TEXT_SUFFIXES)
        raise CalibrationError(
            f"{where}: unknown suffix '{_suffix(path)}'; allowed: {tables}, text and code (.txt, "
            ".md, .py and more), and all of these but .parquet with .gz."
        )
    return _READERS[_suffix(path)](path, where)


def is_read(path: Path) -> bool:
    """Whether files with this suffix are read."""
    return _suffix(path) in _READERS


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


@contextmanager
def _opened(path: Path, where: str, newline: str = "\n") -> Iterator[IO[str]]:
    """Open a text, decompressed. Raises CalibrationError, also for what is found while reading."""
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{where}: not valid UTF-8 ({error.reason}); convert the file to UTF-8."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(
            f"{where}: cannot be read ({error}); check its permissions, or download it again."
        ) from None


def _txt_rows(path: Path, where: str) -> Iterator[Row]:
    return (Row(where, text) for text in _documents(path, where) if text.strip())


def _documents(path: Path, where: str) -> Iterator[str]:
    document = ""
    with _opened(path, where) as lines:
        for line in lines:
            document += line
            if len(document) >= MIN_TXT_DOCUMENT_CHARACTERS:
                yield document
                document = ""
    yield document


def _jsonl_rows(path: Path, where: str) -> Iterator[Row]:
    # Only a line feed ends a line: JSON may hold Unicode's others.
    with _opened(path, where) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{where}, line {number}"
                yield Row(place, _parse_json(line, place))


def _json_rows(path: Path, where: str) -> Iterator[Row]:
    with _opened(path, where) as stream:
        data = _parse_json(stream.read() or "[]", where)
    values = data.values() if isinstance(data, dict) else [data]
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) != 1:
        raise CalibrationError(
            f"{where}: needs one list of objects or strings, at the top or under one key."
        )
    for number, row in enumerate(lists[0], start=1):
        yield Row(f"{where}, row {number}", row)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json_of(text)
    except ValueError as error:
        raise CalibrationError(
            f"{where}: not valid JSON ({error}); correct or remove it."
        ) from None


def _csv_rows(path: Path, where: str, **dialect: Any) -> Iterator[Row]:
    with _opened(path, where, newline="") as lines:
        reader = csv.DictReader(lines, strict=True, **dialect)
        while True:
            # The longest field is the whole process's to say, so each row puts it back.
            limit = csv.field_size_limit(MAX_FIELD)
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise CalibrationError(
                    f"{where}, line {reader.line_num}: not valid CSV ({error}); correct it."
                ) from None
            finally:
                csv.field_size_limit(limit)
            if row is None:
                return
            yield Row(f"{where}, line {reader.line_num}", row)


def _parquet_rows(path: Path, where: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CalibrationError(
            f"{where}: reading parquet needs pyarrow; install secateur[data]."
        ) from None
    try:
        # With a buffer pages are read one by one, not whole columns.
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            batches = file.iter_batches(PARQUET_ROWS, use_threads=False)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from (
                Row(f"{where}, row {number}", row) for number, row in enumerate(rows, start=1)
            )
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(
            f"{where}: broken parquet ({one_line(error)}); write or download it again."
        ) from None


TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .adoc .log .html .htm .xml .css .scss .toml .ini .cfg "
    ".yaml .yml .py .pyi .ipynb .r .jl .m .f90 .c .h .cc .cpp .cxx .hpp .cu .cuh .rs .go .zig "
    ".java .kt .scala .groovy .cs .fs .swift .js .mjs .jsx .ts .tsx .vue .php .rb .pl .lua .dart "
    ".ex .exs .erl .clj .hs .ml .lean .sql .proto .sh .bash .ps1 .bat .cmake .mk .tf .diff "
    ".patch".split()
)
_Reader = Callable[[Path, str], Iterator[Row]]
_READERS: dict[str, _Reader] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    # Whose fields have neither tabs nor line breaks, so that a quotation mark is text.
    ".tsv": partial(_csv_rows, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".parquet": _parquet_rows,
    **dict.fromkeys(sorted(TEXT_SUFFIXES), _txt_rows),
}
