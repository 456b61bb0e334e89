"""Reading a checkpoint: what the user typed becomes a config, a model in memory, a tokenizer.

In: a directory, a `.gguf` file, an installed model's name, or a hub id. Out: a `Checkpoint` (nothing read but JSON and
headers), from it the model in eval mode and the tokenizer. Every defect that can be known without reading weights is
an error before that. Never pickle, never remote code. Not handled: adapters, quantised weights but GGUF.
"""

import contextlib
import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from secateur.arch_conv import linears_for_conv
from secateur.checkpoint_config import BAD_GGUF, BAD_VALUE, directory_config, gguf_config, one_line
from secateur.checkpoint_locate import locate
from secateur.checkpoint_quiet import quiet_transformers
from secateur.checkpoint_tensors import mapped_tensors, read_tensors, stored_tensors
from secateur.errors import CheckpointError
from secateur.modeling_per_layer import is_per_layer, per_layer_class


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that exists and can be loaded, as far as this can be known without reading its weights."""

    reference: str  # what the user typed
    directory: Path
    gguf_file: str | None  # file name inside `directory`, when the weights are GGUF
    config: PreTrainedConfig


def open_checkpoint(reference: str | Path, *, weights: bool = True) -> Checkpoint:
    """Find the model and check its config and, if `weights`, the headers of its weight files; read no weights.

    A hub id is downloaded, with `weights=False` only its JSON and tokenizer files.

    Raises CheckpointError for everything that keeps the model from being loaded, ArchError if it is no causal LM.
    """
    reference = str(reference)
    directory, gguf_file = locate(reference, weights=weights)
    config = gguf_config(directory / gguf_file) if gguf_file else directory_config(directory)
    if weights and not gguf_file:
        floating = [tensor.dtype for tensor in stored_tensors(directory).values() if tensor.dtype.is_floating_point]
        if config.dtype is None and floating:
            config.dtype = floating[0]
    config.name_or_path = ""  # a path of this machine must not reach a saved file
    return Checkpoint(reference, directory, gguf_file, config)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model without storage (meta device), in the config's dtype. Raises CheckpointError on bad values."""
    own_class = _own_class(config)
    try:
        with quiet_transformers(), torch.device("meta"):
            if own_class is not None:
                return own_class._from_config(config)
            auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
            return auto.from_config(config, trust_remote_code=False)
    except BAD_VALUE as error:
        raise CheckpointError(
            f"config of a {config.model_type} model: no model can be built from it ({one_line(error)})."
        ) from None


def check_weights(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Compare the tensors that the safetensors headers promise with those of `model` (the meta model will do).

    Tied weights may be absent. Families whose files hold tensors under other names than the model (fused experts) and
    GGUF files are compared after loading instead. Raises CheckpointError naming the tensor, what it got and expected.
    """
    if checkpoint.gguf_file or get_model_conversion_mapping(model, add_legacy=False):
        return
    stored = stored_tensors(checkpoint.directory)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = re.compile("|".join([r"rotary_emb\.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ())]))
    mismatched = [
        f"{name} is {list(stored[name].shape)}, not {list(shape)} as the config says"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    _refuse(
        checkpoint,
        mismatched=mismatched,
        missing=[name for name in expected if name not in stored and name not in model.all_tied_weights_keys],
        unexpected=[name for name in stored if name not in expected and not ignored.search(name)],
    )


def load(path: str | Path, **options: Any) -> PreTrainedModel:
    """Return the model in eval mode, ready to run or to train; a model of per-layer widths like any other.

    `path`: a directory, a hub id, a `.gguf` file, or `smollm2-135m`. `options` go to transformers' `from_pretrained`:
    `dtype`, `device_map`, `attn_implementation`, ... Without `dtype` the model is in the one it was saved in. Code that
    a checkpoint carries never runs.

    Raises CheckpointError if it cannot be loaded or an option is wrong, ArchError if it is no causal LM.
    """
    if "trust_remote_code" in options:
        raise CheckpointError(
            "load: never runs a checkpoint's own code and so needs no trust_remote_code; leave it out."
        )
    checkpoint = open_checkpoint(path)
    try:
        return load_model(checkpoint, **options)
    except CheckpointError:
        raise
    except (*BAD_VALUE, ImportError) as error:
        names = ", ".join(options) or "no options"
        raise CheckpointError(f"{path}: cannot be loaded with {names} ({one_line(error)}).") from None


def load_model(checkpoint: Checkpoint, *, mapped: bool = False, **options: Any) -> PreTrainedModel:
    """Return the model in eval mode, in the dtype of its config (GGUF: bfloat16), its weights in ordinary memory.

    `mapped`: they stay in their files, which must be safetensors, and come in as they are used. `options` go to
    `from_pretrained`. Raises CheckpointError if tensors are missing, unexpected, misshapen, or not finite.
    """
    with quiet_transformers():
        if checkpoint.gguf_file:
            model, info = _load_gguf(checkpoint, options)
        else:
            model, info = _load_safetensors(checkpoint, options, mapped=mapped)
    _refuse(
        checkpoint,
        mismatched=[f"{name} is {list(got)}, not {list(expected)}" for name, got, expected in info["mismatched_keys"]],
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
    )
    check_finite(model)
    linears_for_conv(model)
    model.config.name_or_path = ""
    return model


def check_finite(model: PreTrainedModel) -> None:
    """Raise CheckpointError naming the first weight that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        # The extremes carry NaN and infinity along, and unlike isfinite() need no memory.
        if parameter.numel() > 0 and not all(torch.isfinite(extreme) for extreme in parameter.detach().aminmax()):
            raise CheckpointError(
                f"weight {name} of the model holds NaN or infinity; use an intact checkpoint of this model."
            )


def _own_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the package's own class for a model that secateur saved with per-layer widths, None for any other."""
    return per_layer_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config).__bases__[0]]) if is_per_layer(config) else None


def _load_safetensors(
    checkpoint: Checkpoint, options: dict[str, Any], *, mapped: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    skeleton = meta_model(checkpoint.config)
    check_weights(checkpoint, skeleton)
    weights = (mapped_tensors if mapped else read_tensors)(checkpoint.directory)
    loaded: Any = type(skeleton).from_pretrained(
        None, config=checkpoint.config, state_dict=weights, output_loading_info=True, **{"dtype": "auto", **options}
    )
    model, info = loaded
    if (checkpoint.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model, info


def _load_gguf(checkpoint: Checkpoint, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    import gguf

    try:
        from transformers import GgufConfig
    except ImportError:
        raise CheckpointError(
            f"{checkpoint.reference}: GGUF weights need transformers 5.17 or newer; upgrade it."
        ) from None

    # transformers asks for the same name table once per module, which is half of the load; and its GGUF reader draws
    # a progress bar that ignores its own switch.
    one_table = patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    try:
        with one_table, contextlib.redirect_stderr(io.StringIO()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.directory,
                gguf_file=checkpoint.gguf_file,
                config=checkpoint.config,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                **{"dtype": torch.bfloat16, **options},
            )
    except BAD_GGUF as error:
        raise CheckpointError(f"{checkpoint.reference}: its GGUF weights cannot be read ({one_line(error)}).") from None
    return loaded


def _refuse(checkpoint: Checkpoint, *, mismatched: list[str], missing: list[str], unexpected: list[str]) -> None:
    for kind, names in (("wrong shape", mismatched), ("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"{checkpoint.reference}: weights and config disagree, {kind}: {names[0]}{more}; "
                "use the config.json and the weights of one and the same model."
            )
