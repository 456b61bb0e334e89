"""The config of a model, checked: there, of a causal LM, run by transformers without remote code, not quantised.

In: a directory with config.json, or a GGUF file. Out: a `PreTrainedConfig`. No weights are read.
"""

import importlib.util
import struct
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from secateur.checkpoint_quiet import quiet_transformers
from secateur.checkpoint_tensors import read_json
from secateur.errors import ArchError, CheckpointError, nearest
from secateur.modeling_per_layer import PREFIX, per_layer_config_class

# What transformers raises for values it cannot use, and gguf for a file that ends early or holds nonsense.
BAD_VALUE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ZeroDivisionError,
    OSError,
    RuntimeError,
    StrictDataclassError,
)
BAD_GGUF = (*BAD_VALUE, struct.error, OverflowError, MemoryError)


def directory_config(directory: Path) -> PreTrainedConfig:
    """Return the config of a model directory.

    Raises CheckpointError if it is missing, broken, unknown to transformers, quantised, or needs remote code; ArchError
    if the model is no causal LM.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: has no config.json, so it is no model; give the directory that holds one.")
    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path}: has no model_type; copy the model's own config.json there.")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise CheckpointError(
                f"{path}: model_type '{model_type}' needs Python code from the checkpoint, which secateur never runs; "
                "use a version of the model that transformers supports itself."
            )
        known = nearest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise CheckpointError(f"{path}: transformers knows no model_type '{model_type}'; did you mean '{known}'?")
    _check_causal(path, model_type, raw.get("architectures"))
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"{path}: the weights are quantised (quantization_config, {_method(raw)}), which cannot be pruned; "
            "use the original checkpoint or one in bf16, prune it, and quantise the result."
        )
    own = raw.get("architectures") == [PREFIX + MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")]
    try:
        with quiet_transformers():
            if own:
                return per_layer_config_class(CONFIG_MAPPING[model_type]).from_pretrained(directory)
            return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except BAD_VALUE as error:
        raise CheckpointError(f"{path}: transformers cannot use it ({one_line(error)}).") from None


def _method(raw: dict[str, Any]) -> str:
    """Return how the weights are quantised, as the config says."""
    told = raw["quantization_config"]
    return str(told.get("quant_method", "method not named")) if isinstance(told, dict) else "method not named"


def gguf_config(path: Path) -> PreTrainedConfig:
    """Return the config that a GGUF file describes. Raises as `directory_config`, and if package gguf is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f'{path}: reading GGUF needs the gguf package; run: pip install "secateur[gguf]"')
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path}: is not a GGUF file (it does not start with GGUF); download it again.")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except BAD_GGUF as error:
        raise CheckpointError(f"{path}: this GGUF file is broken or of an unknown kind ({one_line(error)}).") from None
    _check_causal(path, config.model_type, None)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = torch.bfloat16
    return config


def _check_causal(path: Path, model_type: str, architectures: Any) -> None:
    # A model that sees images holds a language model, which is what can be pruned.
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    known = known or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    names = architectures if isinstance(architectures, list) else []
    if known is None or (names and not any(str(name).endswith("ForCausalLM") or name == known for name in names)):
        got = ", ".join(str(name) for name in names) or f"model_type '{model_type}'"
        raise ArchError(f"{path}: not a causal language model (got {got}); secateur prunes ...ForCausalLM models only.")


def one_line(error: BaseException) -> str:
    """Return what `error` says as part of a sentence."""
    return " ".join(str(error).split())[:300] or type(error).__name__
