"""From a calibration domain to its documents, one by one, in an order that the seed decides.

Installed text is that of Python packages: a run with it needs no network and no files of the user.
Files are found through `importlib.metadata` and `sysconfig`, read as text when their document is
due, and never imported. What is installed decides the text, and the calibration hash.
"""

import ast
import glob
import itertools
import json
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from importlib import resources
from importlib.metadata import PackagePath
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

import yaml
from huggingface_hub import constants
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx or httpx2
)

from secateur.data.forms import Note, NoText, chat_text, content_of, prompt_of, unheard
from secateur.data.rows import EMPTY_FILES, Row, is_read, read_rows
from secateur.errors import CalibrationError, one_line, web_address
from secateur.files import files_in
from secateur.model.stock import Tokenizer
from secateur.plugins import GENERAL_TEXT, general_text, installed_files

MIN_SOURCE_BYTES = 2000
MIN_DOCSTRING_CHARACTERS = 200
MIN_GENERAL_CHARACTERS = 200

_TESTS = {"test", "tests"}
# Not ordinary code: character tables, documentation and build settings in Python syntax.
_SKIPPED_LIBRARY = _TESTS.union(
    ("idlelib", "site-packages", "dist-packages", "encodings", "pydoc_data")
)
_ARTICLE_TAG = re.compile(r"<doc [^>]*>")

# A document, or a function that reads it.
_Document = str | Callable[[], str]


def installed_documents(kind: str, order: Random) -> Iterator[str]:
    """Yield the documents of an installed text (see `recipe.INSTALLED_DOMAINS`) in random order.

    Raises CalibrationError if no package with this text is installed.
    """
    find, carriers = _KINDS[kind]
    documents = find()
    if not documents:
        raise CalibrationError(
            f"calibration text '{kind}': it comes from {carriers}, not found in this Python "
            "environment; install it, or leave the domain out."
        )
    order.shuffle(documents)
    for document in documents:
        text = document if isinstance(document, str) else document()
        if text.strip():
            yield text


def _code() -> list[_Document]:
    library, paths = Path(sysconfig.get_path("stdlib")), list[Path]()
    for directory, subdirectories, names in os.walk(library):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_LIBRARY]
        paths += [
            Path(directory, name)
            for name in names
            if name.endswith(".py") and "_sysconfigdata" not in name
        ]
    return [
        partial(_source, path) for path in sorted(paths) if path.stat().st_size >= MIN_SOURCE_BYTES
    ]


def _general(kind: str) -> list[_Document]:
    path = general_text(kind)
    return [] if path is None else _DOCUMENTS_OF[kind](path.read_text(encoding="utf-8"))


def _conversations(text: str) -> list[_Document]:
    conversations = json.loads(text)
    return [_conversation(conversations[key]["messages"]) for key in sorted(conversations)]


def _lines(text: str) -> list[_Document]:
    return [line for line in text.split("\n") if len(line) >= MIN_GENERAL_CHARACTERS]


def _articles(text: str) -> list[_Document]:
    bodies = (_ARTICLE_TAG.sub("", part).strip() for part in text.split("</doc>"))
    return [body for body in bodies if len(body) >= MIN_GENERAL_CHARACTERS]


def _conversation(turns: list[list[dict[str, Any]]]) -> str:
    messages = [message for turn in turns for message in turn]
    senders = list(dict.fromkeys(message["sender"] for message in messages))
    return "\n".join(
        f"{chr(ord('A') + senders.index(message['sender']))}: {message['text']}"
        for message in messages
    )


def _docstring_files(folders: dict[str, str]) -> list[_Document]:
    """`folders`: distribution name -> installed folder of its package."""
    sources = [
        file
        for name, folder in folders.items()
        for file in installed_files(name) or ()
        if file.parts[0] == folder and file.suffix == ".py" and not _TESTS & set(file.parts)
    ]
    return [partial(_docstrings, file) for file in sorted(sources)]


def _docstrings(file: PackagePath) -> str:
    """Return a file's longer docstrings under their qualified names; empty if not parsable."""
    parts = file.with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    try:
        with warnings.catch_warnings(action="ignore"):  # about invalid escapes
            tree = ast.parse(Path(str(file.locate())).read_bytes())
    except SyntaxError:  # templates, other Python versions
        return ""
    return "\n\n".join(_node_docstrings(tree, module))


def _node_docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text and len(text) >= MIN_DOCSTRING_CHARACTERS:
        yield f"{name}\n\n{text}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _node_docstrings(child, f"{name}.{child.name}")


def _source(path: Path) -> str:
    with tokenize.open(path) as file:  # honours a coding line
        return file.read()


_DOCUMENTS_OF = {
    "web": _lines,
    "encyclopedia": _articles,
    "multilingual": _lines,
    "dialogue": _conversations,
}
_KINDS: dict[str, tuple[Callable[[], list[_Document]], str]] = {
    "code": (_code, "the .py files of the standard library"),
    "mathematics": (
        partial(_docstring_files, {"sympy": "sympy", "mpmath": "mpmath"}),
        "the packages sympy and mpmath",
    ),
    "science": (
        partial(
            _docstring_files, {"networkx": "networkx", "scipy": "scipy", "scikit-learn": "sklearn"}
        ),
        "the packages networkx, scipy and scikit-learn",
    ),
} | {
    kind: (partial(_general, kind), f"the package {package}")
    for kind, (package, _) in GENERAL_TEXT.items()
}


# Rows in memory together, which are shuffled among each other. Python takes so much for a value
# beside its text.
MAX_BYTES_SHUFFLED, BYTES_PER_VALUE = 2**27, 50


OTHER_FILES = "files left out, since files of their kind are not read"


def _files_at(place: str, note: Note) -> list[Path]:
    """Return the file that a path names, or those of a directory or a pattern that are read,
    sorted; note the others.

    Hidden files and directories are left out. Raises CalibrationError if there is no file.
    """
    path = Path(place).expanduser()
    if web_address(place):
        raise CalibrationError(
            f"calibration files {place}: is a web address; download it, and give the file."
        )
    if path.is_dir():
        paths = [path / name for name in files_in(path, hidden=False)]
    elif path.is_file():
        return [path]
    else:
        paths = [Path(file) for file in glob.iglob(str(path), recursive=True)]
    if not (files := sorted(file for file in paths if file.is_file())):
        raise CalibrationError(
            f"calibration files {place}: there is no such file; paths are relative to the working "
            "directory, and hidden files do not count."
        )
    known = [*filter(is_read, files)]
    for file in set(files).difference(known):
        note(OTHER_FILES, str(file))
    return known


@runtime_checkable
class DomainText(Protocol):
    """The source of one domain's text, and what to read from it."""

    answers: bool
    config: str | None
    revision: str | None
    split: str
    column: str
    share: float

    @property
    def source(self) -> tuple[str, Any]:
        """Return the source's key and what the user wrote there."""
        ...


# From a domain and a random order (by seed and domain) to documents or rows; the note gets what is
# left out.
Source = Callable[[DomainText, Random, Note], Iterable[str | Row]]
# So many rows without text at the beginning, and there will be none.
ROWS_TRIED = 200


def documents(
    name: str, domain: DomainText, tokenizer: Tokenizer | None, seed: int, note: Note = unheard
) -> Iterator[str]:
    """Yield the documents of the domain `name`, shuffled by seed and name, without blank ones.

    Of a domain of answers a document is a prompt: a text, or a chat up to its first user's turn, as
    the chat template writes it up to where the model answers; without a `tokenizer` it is what the
    user says.

    `note`: gets what happened to every row or file that is left out or changed.

    Raises CalibrationError, while iterating, for text that is missing, unreadable or not text.
    """
    rows = SOURCES[domain.source[0]](domain, Random(f"{seed}:{name}"), note)
    problem: NoText | None = None
    num_usable = 0
    for number, row in enumerate(rows, start=1):
        where, content = (
            row if isinstance(row, Row) else (f"domain '{name}', document {number}", row)
        )
        try:
            text = _row_text(content, domain, tokenizer, where, note)
        except NoText as error:
            problem = problem or error
            note(error.what, where)
            if num_usable == 0 and number >= ROWS_TRIED:
                break
            continue
        if text.strip():
            num_usable += 1
            yield text
    if problem is not None and num_usable == 0:
        raise problem


def file_rows(domain: DomainText, order: Random, note: Note) -> Iterator[Row]:
    """Yield the rows of all files, shuffled together; of larger ones as many at a time as fit
    memory.

    Then each file gives a share by its size, from its beginning on, and what is not asked for is
    not read.

    Raises CalibrationError for a bad file; NoText for a named one without a row that has text, or
    if no file of a directory or pattern has any.
    """
    files_of = {place: _files_at(place, note) for place in domain.source[1]}
    num_bytes = {
        file: file.stat().st_size for files in files_of.values() for file in files if file.is_file()
    }
    total = sum(num_bytes.values())
    rows: list[Row] = []
    unread: list[tuple[Path, int]] = []

    def read_on(file: Path, start: int) -> list[Row]:
        part, is_whole = _some_rows(
            file, start, MAX_BYTES_SHUFFLED * num_bytes.get(file, 0) / max(1, total)
        )
        if not is_whole:
            unread.append((file, start + len(part)))
        return part

    # The first rows of every file, as far as they have text.
    for place, files in files_of.items():
        num_before, problem = len(rows), None
        for file in files:
            try:
                rows += _with_text(read_on(file, 0), file, domain)
            except NoText as error:
                problem = problem or error
                note(EMPTY_FILES, str(file))
        if len(rows) == num_before:
            raise problem or CalibrationError(
                f"calibration files {place}: there is no file of a kind that is read."
            )
    order.shuffle(rows)
    yield from rows

    # What did not fit beside them.
    while unread:
        left, unread = unread, []
        rows = [row for file, start in left for row in read_on(file, start)]
        order.shuffle(rows)
        yield from rows


def _some_rows(path: Path, start: int, num_bytes: float) -> tuple[list[Row], bool]:
    """Return so many bytes of rows from row `start` on, one at least, and whether the file ends
    there.
    """
    rows: list[Row] = []
    for row in itertools.islice(read_rows(path), start, None):
        rows.append(row)
        num_bytes -= _size(row.content)
        if num_bytes < 0:
            return rows, False
    return rows, True


def _size(value: Any) -> int:
    """Return about how many bytes of memory a value of a row takes."""
    if isinstance(value, dict | list):
        return BYTES_PER_VALUE + sum(
            map(_size, value.values() if isinstance(value, dict) else value)
        )
    return BYTES_PER_VALUE + (len(value) if isinstance(value, str) else 0)


def _with_text(rows: list[Row], path: Path, domain: DomainText) -> list[Row]:
    """Return a file's rows. Raises NoText, with the fields of the first, if none of them has
    text.
    """
    problem: NoText | None = None
    for where, row in rows:
        try:
            content = content_of(row, domain.column, where, answered=domain.answers)
        except NoText as error:
            problem = problem or error
            continue
        if not isinstance(content, str) or content.strip():
            return rows
    raise problem or NoText(
        f"calibration file {path}: column '{domain.column}' is blank in every row; set `column` to "
        "one that holds text."
    )


def dataset_rows(domain: DomainText, order: Random, note: Note) -> Iterator[Row]:
    """Yield the rows of a `datasets` hub id, streamed while online. Raises CalibrationError."""
    name, offline = domain.source[1], constants.HF_HUB_OFFLINE
    where = f"dataset {name}"
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise CalibrationError(
            f"{where}: needs the package datasets; install secateur[data]."
        ) from None
    try:
        # Streaming never reads the local cache.
        options: Any = {
            "split": domain.split,
            "revision": domain.revision,
            "streaming": not offline,
        }
        rows = datasets.load_dataset(name, domain.config, **options)
        for number, row in enumerate(rows.shuffle(seed=order.getrandbits(32)), start=1):
            yield Row(f"{where}, row {number} of its shuffled order", row)
    except (OSError, ValueError, RuntimeError, DatasetsError, HTTPError) as error:
        advice = "check its id, config, revision and split, and the network"
        if offline:
            advice = (
                "HF_HUB_OFFLINE=1 forbids the network, so load it once with datasets.load_dataset "
                "while online to fill the local cache, or give its text as files"
            )
        raise CalibrationError(
            f"{where}: cannot be loaded ({one_line(error)}); {advice}."
        ) from None


def question_rows(domain: DomainText, order: Random, note: Note) -> Iterator[str]:
    """Yield the prompts that come with secateur for a model to answer, shuffled."""
    questions = list(shipped("questions.yaml"))
    order.shuffle(questions)
    yield from questions


SOURCES: dict[str, Source] = {
    "installed": lambda domain, order, note: installed_documents(domain.source[1], order),
    "files": file_rows,
    "dataset": dataset_rows,
    "answers": question_rows,
}


def _row_text(
    row: Any, domain: DomainText, tokenizer: Tokenizer | None, where: str, note: Note
) -> str:
    answered = domain.answers
    content = content_of(row, domain.column, where, note, answered=answered)
    if answered:
        content = prompt_of(content, where)
    if isinstance(content, str):
        text = content
    elif tokenizer is None:
        text = content.messages[-1]["content"]
    else:
        text = chat_text(content.messages, tokenizer, where, content.tools, note, answered=answered)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape what UTF-8 cannot hold
        raise CalibrationError(
            f"{where}: the text holds half of a surrogate pair; remove it."
        ) from None
    return text


@cache
def shipped(file: str) -> tuple[str, ...]:
    """Return a file's texts, kinds by turns."""
    kinds = yaml.safe_load(resources.files("secateur").joinpath("data", file).read_bytes()).values()
    turns = itertools.zip_longest(*kinds)
    return tuple(text for turn in turns for text in turn if text is not None)
