"""Which model this is: its fingerprint, its hub id and licence, and which models a result was
pruned from.

In: opened checkpoints, and the `result.json` of a result. Out: `Ancestor`s; or one sentence.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from secateur.errors import CheckpointError
from secateur.facts import Ancestor, parse_json
from secateur.files import json_of, lies_in, read_json, yaml_of
from secateur.model.checkpoint import Checkpoint, weight_digests
from secateur.model.config import INSTALLED_HUB_IDS
from secateur.model.stock import BAD_GGUF
from secateur.result_directory import RESULT_FILE

# What a config says of the program or the place that it was written by.
_OF_THE_WRITER = {"transformers_version", "_name_or_path"}
SHOWN = 12  # characters of a fingerprint in a sentence
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_IN_CACHE = re.compile(r"/models--([^/]+)/snapshots/[^/]+$")
MOST_CARD_BYTES = 1 << 20
_LICENSE, _LANGUAGE = (
    re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}"),
    re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z]{2,8})?"),
)


def identity(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of config.json and, of each weight file, its size and three megabytes.

    The same files under other names or in another place have the same one.
    """
    config = {} if checkpoint.gguf_file else read_json(checkpoint.directory / "config.json")
    facts = [{key: value for key, value in config.items() if key not in _OF_THE_WRITER}]
    text = json.dumps([*facts, sorted(weight_digests(checkpoint).values())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def lineage(checkpoint: Checkpoint, num_params: int) -> tuple[Ancestor, ...]:
    """Return the models that a result of pruning this one comes from: the original first, this one
    last.

    Raises CheckpointError if the checkpoint is a result whose `result.json` is damaged.
    """
    folder, file = checkpoint.directory, checkpoint.gguf_file
    card = _card(folder) if file is None else _gguf_card(folder / file)
    own = Ancestor(
        name_of(checkpoint),
        identity(checkpoint),
        num_params,
        _hub_id(checkpoint),
        **_licence(card, checkpoint),
    )
    return (*(ancestors(checkpoint) or ()), own)


def name_of(checkpoint: Checkpoint) -> str:
    """Return what files call the model: its hub id, or the last part of its path."""
    place = checkpoint.directory / (checkpoint.gguf_file or "")
    return _hub_id(checkpoint) or place.resolve().name


def in_memory(name: str, num_params: int) -> tuple[Ancestor, ...]:
    """Return the lineage of a result of pruning a model in memory. `name`: of its config."""
    try:
        cached = try_to_load_from_cache(name, "config.json")  # else it may be a path
    except HFValidationError:
        cached = None
    hub_id = name if isinstance(cached, str) else None
    return (Ancestor(hub_id or Path(name).name or name, None, num_params, hub_id),)


@dataclass(frozen=True, slots=True)
class _Result:
    """What `result.json` says of the models it comes from."""

    lineage: tuple[Ancestor, ...]


def ancestors(checkpoint: Checkpoint) -> tuple[Ancestor, ...] | None:
    """Return the lineage of a result as its `result.json` has it; None if the checkpoint is no
    result.

    Raises CheckpointError if the file is damaged.
    """
    path = checkpoint.directory / RESULT_FILE
    if checkpoint.gguf_file or not is_result(checkpoint.directory):
        return None
    return parse_json(_Result, path.read_bytes(), str(path)).lineage


def is_result(directory: Path) -> bool:
    """Whether the directory holds a `result.json` of ours, damaged or not; other programs write
    such files too.
    """
    path = directory / RESULT_FILE
    if not path.is_file():
        return False
    try:
        parsed = json_of(path.read_bytes())
    except ValueError:
        return True
    return isinstance(parsed, dict) and "dense_size" in parsed


def check_dense(
    pruned: Checkpoint, dense: Checkpoint, option: str, *, other: bool
) -> tuple[str, ...]:
    """Return a note where it is not known that one was pruned from the other, or another model is
    meant.

    `option`: how the dense model was given. `other`: that it is another one is meant. Raises
    CheckpointError if it is another one and not meant, or if the two are swapped.
    """
    of_pruned, of_dense = ancestors(pruned), ancestors(dense)
    print_of_pruned, print_of_dense = identity(pruned), identity(dense)
    is_itself = print_of_dense == print_of_pruned
    if print_of_pruned in (model.fingerprint for model in of_dense or ()):
        raise CheckpointError(
            f"{option} {dense.reference}: was itself pruned from {pruned.reference}, so the two "
            f"are swapped; give {dense.reference} as the result, and {pruned.reference} with "
            f"{option}."
        )
    if of_pruned is None:
        if of_dense is None or other:
            return ()
        raise CheckpointError(
            f"{option} {dense.reference}: is itself a result of pruning ({of_dense[-1].name}), and "
            f"{pruned.reference} is none; swap the two, or give --other-dense if this is meant."
        )
    last = of_pruned[-1]
    if print_of_dense in (model.fingerprint for model in of_pruned):
        return ()
    if last.fingerprint is None and not is_itself:
        return (
            f"whether {name_of(dense)} is the model that {name_of(pruned)} was pruned from "
            f"({last.name}) is not known: its {RESULT_FILE} has no fingerprint of it.",
        )
    dense_print = "the result itself" if is_itself else f"fingerprint {print_of_dense[:SHOWN]}"
    wanted = (
        last.name
        if last.fingerprint is None
        else f"{last.name} (fingerprint {last.fingerprint[:SHOWN]})"
    )
    if other:
        return (
            f"dense is here {name_of(dense)} ({dense_print}), and not {wanted}, which "
            f"{name_of(pruned)} was pruned from.",
        )
    raise CheckpointError(
        f"{option} {dense.reference}: is not the model that {pruned.reference} was pruned from, "
        f"but {dense_print}; give {wanted}, or --other-dense if another model is meant."
    )


def _hub_id(checkpoint: Checkpoint) -> str | None:
    """Return the hub id that was given, or that a directory of the hub's cache is named after."""
    if checkpoint.reference in INSTALLED_HUB_IDS:
        return INSTALLED_HUB_IDS[checkpoint.reference]
    if not checkpoint.gguf_file and not Path(checkpoint.reference).exists():
        return checkpoint.reference
    cached = _IN_CACHE.search(checkpoint.directory.absolute().as_posix())
    return cached[1].replace("--", "/") if cached else None


def _card(directory: Path) -> dict[str, Any]:
    """Return the metadata of the model's card; empty if it has none that can be read."""
    path = directory / "README.md"
    if not path.is_file() or not lies_in(directory, path) or path.stat().st_size > MOST_CARD_BYTES:
        return {}
    matter = _FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace"))
    try:
        card = yaml_of(matter[1]) if matter else {}
    except ValueError:
        return {}
    return card if isinstance(card, dict) else {}


# The keys of a card as GGUF has them.
_IN_GGUF = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
}


def _gguf_card(file: Path) -> dict[str, Any]:
    import gguf

    try:
        fields: Mapping[str, Any] = gguf.GGUFReader(file).fields
        return {key: fields[name].contents() for key, name in _IN_GGUF.items() if name in fields}
    except BAD_GGUF:
        return {}  # whoever loads the weights says what is wrong with them


def _licence(card: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """Return licence and languages of a card's metadata, those that the hub takes."""
    names, languages = card.get("license"), card.get("language")
    name = names if isinstance(names, str) and _LICENSE.fullmatch(names) else None
    licence: dict[str, Any] = {"license": name}
    if name is not None:
        title, link = card.get("license_name"), card.get("license_link")
        licence["license_name"] = (
            title if isinstance(title, str) and title.isprintable() and len(title) < 100 else None
        )
        if isinstance(link, str) and (
            link.startswith("https://") or (checkpoint.directory / Path(link).name).is_file()
        ):
            licence["license_link"] = link if link.startswith("https://") else Path(link).name
    many = languages if isinstance(languages, list) else [languages]
    licence["languages"] = tuple(
        code for code in many if isinstance(code, str) and _LANGUAGE.fullmatch(code)
    )
    return licence
