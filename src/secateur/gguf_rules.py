"""Whether llama.cpp runs a model as it is: its family's row, or one sentence that says what stands against it.

In: a checkpoint, or a config and what a run would leave. Nothing is read but the config.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from secateur.arch_spec import GgufSpec
from secateur.checkpoint import Checkpoint
from secateur.errors import ArchError
from secateur.gguf_family import gguf_specs, head_dim, rotary
from secateur.modeling_per_layer import is_per_layer

ROTARY_TYPES = ("default", "linear", "llama3", "yarn")


def gguf_family(checkpoint: Checkpoint) -> GgufSpec:
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


def _family(config: Any, reference: str, *, per_layer: bool) -> GgufSpec:
    uniform, uneven = gguf_specs(per_layer=False), gguf_specs(per_layer=True)
    if config.model_type not in uniform:
        raise ArchError(
            f"{reference}: GGUF export knows the families {', '.join(sorted(uniform))}, "
            f"not '{config.model_type}'; llama.cpp's own script may know it."
        )
    if per_layer and config.model_type not in uneven:
        raise ArchError(
            f"{reference}: its layers have different widths, which llama.cpp runs of the families "
            f"{', '.join(sorted(uneven))}, not '{config.model_type}'; prune with widths: uniform."
        )
    family = (uneven if per_layer else uniform)[config.model_type]
    where = f"{reference}: llama.cpp's {family.architecture}"
    if family.full_width_heads and (width := config.num_attention_heads * head_dim(config)) != config.hidden_size:
        raise ArchError(
            f"{where} needs query heads * head_dim to be the hidden size {config.hidden_size}, got {width}; "
            "prune groups other than attention heads."
        )
    for key, expected in _taken(config, family):
        got = _value(config, key)
        if got != expected and not (expected in (None, False) and got in (None, False)):
            raise ArchError(f"{where} takes {key} to be {expected}, the config says {got}; keep it in safetensors.")
    if rotary(config)["rope_type"] not in ROTARY_TYPES:
        raise ArchError(
            f"{reference}: rope_type '{rotary(config)['rope_type']}' has no counterpart in GGUF; "
            f"allowed: {', '.join(ROTARY_TYPES)}."
        )
    return family


def _taken(config: Any, family: GgufSpec) -> Iterator[tuple[str, Any]]:
    """Yield what llama.cpp takes for granted, by config key, where it depends on the config for this one."""
    yield from family.takes.items()
    yield from ((key, _value(config, other)) for key, other in family.same.items())
    yield from ((key, min(_value(config, key), limit)) for key, limit in family.at_most.items())
    layers = range(1, config.num_hidden_layers + 1)
    if period := family.window_period:
        yield "layer_types", ["sliding_attention" if layer % period else "full_attention" for layer in layers]
    if period := family.rotary_period:
        yield "no_rope_layers", [int(layer % period > 0) for layer in layers]
    if family.largest_num_layers is not None:
        is_largest = config.num_hidden_layers == family.largest_num_layers
        width = config.hidden_size // config.num_attention_heads if is_largest else head_dim(config)
        yield "query_pre_attn_scalar", width


def _value(config: Any, key: str) -> Any:
    """Return what the config says of a key, None where it lacks it; a dot leads into a dictionary."""
    name, _, inner = key.partition(".")
    value = getattr(config, name, None)
    if name == "hidden_activation":  # early configs of Gemma have the other key alone
        value = value or config.hidden_act
    return (value or {}).get(inner) if inner else value
