"""Local calibration files to rows: .txt, .jsonl, .json and .csv, each also with .gz, and .parquet.

In: a path. Out: (where, row) pairs in file order; `where` names file and row for error messages, a row is a document
(str) or a mapping of columns. Files are read fully into memory. What a row means is not decided here.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.errors import CalibrationError

MIN_TXT_DOCUMENT_CHARACTERS = 8000
MAX_CSV_FIELD_CHARACTERS = 2**31 - 1  # the largest that the csv module takes on every platform

Rows = list[tuple[str, Any]]


def read_rows(path: Path) -> Rows:
    """Return the rows of a file.

    Raises CalibrationError, naming the file and where it applies the line or byte: no such file, an unknown suffix,
    empty, not UTF-8, broken in its format.
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
    # Not splitlines: JSON strings may hold Unicode line separators.
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
        return json.loads(text)
    except (ValueError, RecursionError) as error:
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


_READERS: dict[str, Callable[[str, str], Rows]] = {
    ".txt": _txt_rows,
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
}
