"""From a file to its rows, as a stream: what is not asked for is not read, and memory stays
bounded.
"""

import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from secateur.data.forms import NoText
from secateur.errors import CalibrationError, one_line
from secateur.files import json_of
from secateur.log import human_bytes

MIN_TXT_DOCUMENT_CHARACTERS = 8000
# Parts of a file that can only be read whole. A few bytes of a compressed file may stand for any
# number.
MAX_LINE_BYTES, MAX_ROW_GROUP_BYTES, MAX_JSON_BYTES = 2**24, 2**30, 2**28
PARQUET_ROWS, PARQUET_VALUE_BYTES = 16, 8
EMPTY_FILES = "files left out, since they hold no text"


class Row(NamedTuple):
    """A document, or a mapping of columns, one of which is text. `where`: for errors."""

    where: str
    content: Any


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file; a text is cut into documents at line boundaries.

    Raises CalibrationError, naming the file and if possible the line or byte, if it is empty,
    not UTF-8, broken or of an unknown format, or if a line or a row group is too large.
    """
    where = f"calibration file {path}"
    ending, reader = _ending_and_reader(path)
    if reader is None:
        tables = ", ".join(suffix for suffix in _READERS if suffix not in TEXT_SUFFIXES)
        raise CalibrationError(
            f"{where}: unknown suffix '{ending}'; allowed: {tables}, text and code (.txt, .md, .py "
            "and more), all of these also with .gz, and .parquet."
        )
    rows = reader(path, where)
    first = next(rows, None)
    if first is None:
        raise NoText(f"{where}: it is empty; give a file with text in it.", EMPTY_FILES)
    yield first
    yield from rows


def is_read(path: Path) -> bool:
    """Whether files with this suffix are read."""
    return _ending_and_reader(path)[1] is not None


def _ending_and_reader(path: Path) -> tuple[str, "_Reader | None"]:
    """Return a file's suffix, with `.gz`, and what reads such files."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if name.endswith(".gz"):
        return f"{suffix}.gz", _READERS.get(suffix)
    return suffix, _parquet_rows if suffix == ".parquet" else _READERS.get(suffix)


@contextmanager
def _opened(path: Path, where: str) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Open a file, decompressed. Raises CalibrationError, also for what is found while reading."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CalibrationError(
            f"{where}: broken gzip ({error}); compress or download it again."
        ) from None
    except OSError as error:
        raise CalibrationError(
            f"{where}: cannot be read ({error.strerror}); check its permissions."
        ) from None


def _decoded(data: bytes, where: str, start: int = 0) -> str:
    """Return the text of bytes that begin at byte `start` of their file."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = start + error.start
        raise CalibrationError(
            f"{where}: not valid UTF-8 at byte {place}; convert the file to UTF-8."
        ) from None
    return text if start else text.removeprefix("\ufeff")


def _lines(path: Path, where: str) -> Iterator[str]:
    """Yield the lines with their ends. Only a line feed ends one: JSON may hold Unicode's
    others.
    """
    start = num_blank_bytes = 0
    with _opened(path, where) as stream:
        for number in itertools.count(1):
            line = stream.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            # Blank lines without end are no text either, and nobody would see the first document.
            num_blank_bytes = 0 if line.strip() else num_blank_bytes + len(line)
            if max(len(line), num_blank_bytes) > MAX_LINE_BYTES:
                limit = human_bytes(MAX_LINE_BYTES)
                raise CalibrationError(
                    f"{where}, line {number}: {limit} without a line of text; break it into lines."
                )
            yield _decoded(line, where, start)
            start += len(line)


def _txt_rows(path: Path, where: str) -> Iterator[Row]:
    return (Row(where, text) for text in _documents(path, where) if text.strip())


def _documents(path: Path, where: str) -> Iterator[str]:
    document = ""
    for line in _lines(path, where):
        document += line
        if len(document) >= MIN_TXT_DOCUMENT_CHARACTERS:
            yield document
            document = ""
    yield document


def _jsonl_rows(path: Path, where: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, where), start=1):
        if line.strip():
            place = f"{where}, line {number}"
            yield Row(place, _parse_json(line, place))


def _json_rows(path: Path, where: str) -> Iterator[Row]:
    with _opened(path, where) as stream:
        content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        limit = human_bytes(MAX_JSON_BYTES)
        raise CalibrationError(
            f"{where}: is longer than {limit}; write it as .jsonl, which is read line by line."
        )
    text = _decoded(content, where)
    data = _parse_json(text, where) if text.strip() else []
    lists = (
        [value for value in data.values() if isinstance(value, list)]
        if isinstance(data, dict)
        else [data]
    )
    if len(lists) != 1 or not isinstance(lists[0], list):
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
    lines = (part for line in _lines(path, where) for part in io.StringIO(line, newline=""))
    reader = csv.DictReader(lines, strict=True, **dialect)
    while True:
        # A field may span lines. The limit is the whole process's, so each row puts it back.
        limit = csv.field_size_limit(MAX_LINE_BYTES)
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
    if not path.stat().st_size:
        return
    numbers = itertools.count(1)
    try:
        # With a buffer pages are read one by one, not whole columns.
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                # A list's values, too: a row of them may be packed into a few bytes.
                about = file.metadata.row_group(group)
                num_values = max(
                    (about.column(number).num_values for number in range(about.num_columns)),
                    default=0,
                )
                num_bytes = max(
                    about.total_byte_size, PARQUET_VALUE_BYTES * (num_values - about.num_rows)
                )
                if num_bytes > MAX_ROW_GROUP_BYTES:
                    raise CalibrationError(
                        f"{where}, row group {group + 1}: holds {human_bytes(num_bytes)}, more "
                        f"than {human_bytes(MAX_ROW_GROUP_BYTES)}; write the file with smaller row "
                        "groups."
                    )
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], use_threads=False):
                    yield from (
                        Row(f"{where}, row {next(numbers)}", row) for row in batch.to_pylist()
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
    **dict.fromkeys(sorted(TEXT_SUFFIXES), _txt_rows),
}
