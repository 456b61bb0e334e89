"""Calibration text from installed Python packages: a run with it needs no network and no files.

In: the name of an installed text and a random order. Out: its documents; a file is read and parsed
only when its document is due. Files are found through `importlib.metadata` and `sysconfig`, read as
text and never imported. What is installed decides the text, and the calibration hash.
"""

import ast
import importlib.metadata
import json
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, PackagePath
from pathlib import Path
from random import Random
from typing import Any

from secateur.errors import CalibrationError
from secateur.plugins import GENERAL_TEXT, general_text

MIN_SOURCE_BYTES = 2000
MIN_DOCSTRING_CHARACTERS = 200
MIN_GENERAL_CHARACTERS = 200

# Not ordinary code: character tables, documentation and build settings in Python syntax.
_SKIPPED_LIBRARY = {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "pydoc_data"}
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
        missing = f"it comes from {carriers}, not found in this Python environment"
        raise CalibrationError(f"calibration text '{kind}': {missing}; install it, or leave the domain out.")
    order.shuffle(documents)
    for document in documents:
        text = document if isinstance(document, str) else document()
        if text.strip():
            yield text


def _code() -> list[_Document]:
    library, paths = Path(sysconfig.get_path("stdlib")), list[Path]()
    for directory, subdirectories, names in os.walk(library):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_LIBRARY]
        paths += [Path(directory, name) for name in names if name.endswith(".py") and "_sysconfigdata" not in name]
    return [partial(_source, path) for path in sorted(paths) if path.stat().st_size >= MIN_SOURCE_BYTES]


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
    return "\n".join(f"{chr(ord('A') + senders.index(message['sender']))}: {message['text']}" for message in messages)


def _docstring_files(folders: dict[str, str]) -> list[_Document]:
    """`folders`: distribution name -> installed folder of its package."""
    files = [file for name, folder in folders.items() for file in _package_files(name) if file.parts[0] == folder]
    sources = [file for file in files if file.suffix == ".py" and not {"test", "tests"} & set(file.parts)]
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


def _package_files(name: str) -> list[PackagePath]:
    try:
        return importlib.metadata.distribution(name).files or []
    except PackageNotFoundError:
        return []


_DOCUMENTS_OF = {"web": _lines, "encyclopedia": _articles, "multilingual": _lines, "dialogue": _conversations}
_KINDS: dict[str, tuple[Callable[[], list[_Document]], str]] = {
    "code": (_code, "the .py files of the standard library"),
    "mathematics": (partial(_docstring_files, {"sympy": "sympy", "mpmath": "mpmath"}), "the packages sympy and mpmath"),
    "science": (
        partial(_docstring_files, {"networkx": "networkx", "scipy": "scipy", "scikit-learn": "sklearn"}),
        "the packages networkx, scipy and scikit-learn",
    ),
} | {kind: (partial(_general, kind), f"the package {package}") for kind, (package, _) in GENERAL_TEXT.items()}
