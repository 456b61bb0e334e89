"""Whether llama.cpp runs a model as it is: its family's row, or one sentence that says what stands against it.

In: a checkpoint, or a config and what a run would leave. Nothing is read but the config.
"""

import copy
from collections.abc import Mapping
from typing import Any

from secateur.checkpoint import Checkpoint
from secateur.errors import ArchError
from secateur.gguf_families import FAMILIES, PER_LAYER
from secateur.gguf_family import GgufFamily, head_dim, rotary
from secateur.modeling_per_layer import is_per_layer

ROTARY_TYPES = ("default", "linear", "llama3", "yarn")


def gguf_family(checkpoint: Checkpoint) -> GgufFamily:
    """Return how the checkpoint's family goes into GGUF. Raises ArchError for what llama.cpp would not run as it is."""
    config = checkpoint.config
    return _family(config, checkpoint.reference, per_layer=is_per_layer(config))


def gguf_problem(config: Any, widths: Mapping[str, frozenset[int]], num_head_channels: int) -> str | None:
    """Return what keeps a model of this config from GGUF once it has these widths, by config key, or None.

    `num_head_channels`: of one attention head; it stays where heads go.
    """
    planned, per_layer = copy.deepcopy(config), any(len(values) > 1 for values in widths.values())
    if not per_layer:
        sizes: Any = planned.get_text_config()
        num_heads = sizes.num_attention_heads
        for key, (width,) in widths.items():
            setattr(sizes, key, width)
        if sizes.num_attention_heads != num_heads:
            sizes.head_dim = num_head_channels
    try:
        _family(planned, "the result", per_layer=per_layer)
    except ArchError as error:
        return str(error)
    return None


def _family(config: Any, reference: str, *, per_layer: bool) -> GgufFamily:
    if config.model_type not in FAMILIES:
        raise ArchError(
            f"{reference}: GGUF export knows the families {', '.join(sorted(FAMILIES))}, "
            f"not '{config.model_type}'; llama.cpp's own script may know it."
        )
    if per_layer and config.model_type not in PER_LAYER:
        raise ArchError(
            f"{reference}: its layers have different widths, which llama.cpp runs of the families "
            f"{', '.join(PER_LAYER)}, not '{config.model_type}'; prune with widths: uniform."
        )
    family = (PER_LAYER if per_layer else FAMILIES)[config.model_type]
    where = f"{reference}: llama.cpp's {family.architecture}"
    if family.full_width_heads and (width := config.num_attention_heads * head_dim(config)) != config.hidden_size:
        raise ArchError(
            f"{where} needs query heads * head_dim to be the hidden size {config.hidden_size}, got {width}; "
            "prune groups other than attention heads."
        )
    for key, taken in family.takes.items():
        got, expected = _value(config, key), taken(config) if callable(taken) else taken
        if got != expected and not (expected in (None, False) and got in (None, False)):
            raise ArchError(f"{where} takes {key} to be {expected}, the config says {got}; keep it in safetensors.")
    if rotary(config)["rope_type"] not in ROTARY_TYPES:
        raise ArchError(
            f"{reference}: rope_type '{rotary(config)['rope_type']}' has no counterpart in GGUF; "
            f"allowed: {', '.join(ROTARY_TYPES)}."
        )
    return family


def _value(config: Any, key: str) -> Any:
    """Return what the config says of a key, None where it lacks it; a dot leads into a dictionary."""
    name, _, inner = key.partition(".")
    value = getattr(config, name, None)
    if name == "hidden_activation":  # early configs of Gemma have the other key alone
        value = value or config.hidden_act
    return (value or {}).get(inner) if inner else value
