"""What llama.cpp computes for each model type, and whether it runs a result: YAML files in
`families/`.

In: a checkpoint or its config. Out: a sentence with the problem, or llama.cpp's facts of the family
and the widths by layer. What a model consists of, `model.bind` finds in the modules.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter

from secateur.errors import ArchError
from secateur.model.checkpoint import Checkpoint
from secateur.model.modeling_per_layer import is_per_layer
from secateur.model.stock import head_width


class GgufSpec(BaseModel):
    """What llama.cpp computes for an architecture. `takes`, `same`, `at_most`: what it assumes.

    A key that the config lacks counts as None; a dot leads into a mapping. Not handled: images;
    experts in some layers only, unless in all but the first few.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    takes: dict[str, Any] = {}  # config key -> its value
    same: dict[str, str] = {}  # config key -> the key that has the same value
    at_most: dict[str, int] = {}  # config key -> its largest value
    # The key or value of the norms' epsilon. Only `rms_norm_eps` means RMS norms.
    eps: str | float = "rms_norm_eps"
    scales: dict[str, str] = {}  # config key -> the `add_` method of gguf's writer
    # Rotates channels 2i and 2i+1, not i and i + head_dim/2, so rows of q and k are permuted.
    interleaved_rotary: bool = False
    full_width_heads: bool = False  # query heads * head_dim must be the hidden size
    norm_offset: int = 0  # transformers adds it to norm weights, llama.cpp does not
    window_period: int = 0  # every n-th layer has no sliding window, the others do; 0: none do
    rotary_period: int = 0  # every n-th layer has no rotary positions; 0: all do
    # The model of this depth scales attention by hidden_size / heads, not head_dim.
    largest_num_layers: int | None = None
    # The matrix that holds an expert's gate and input together; llama.cpp stores two.
    fused_gate: str = ""
    alternating_gate: bool = False  # their rows alternate
    transposed: tuple[str, ...] = ()  # modules that store their weight transposed
    fused_qkv: bool = False  # q, k and v are separate here, one matrix in llama.cpp
    latent_attention: bool = False  # DeepSeek's MLA: one latent vector holds all keys and values
    # The architecture that computes the same with per-layer widths: `deci` (Nemotron's pruned
    # Llamas), or `openelm`, which has query and key norms.
    per_layer: "GgufSpec | None" = None


_FILE = TypeAdapter(dict[str, dict[Literal["gguf"], GgufSpec]])


@cache
def gguf_specs() -> dict[str, GgufSpec]:
    """Return what is known, by model type."""
    files = sorted(Path(__file__).with_name("families").glob("*.yaml"))
    families = [_FILE.validate_python(yaml.safe_load(file.read_bytes())) for file in files]
    return {key: row["gguf"] for family in families for key, row in family.items()}


def rotary(config: Any) -> dict[str, Any]:
    """Return the rotary settings, with `rope_type` and `rope_theta`, of full-attention layers.

    Hunyuan's `dynamic` with a fixed `alpha` is a larger theta, theta * alpha^(d / (d - 2)).
    A model without rotary positions gets transformers' default, which nothing reads.
    """
    parameters = getattr(config, "rope_parameters", None) or {
        "rope_type": "default",
        "rope_theta": 10000.0,
    }
    rope = dict(parameters.get("full_attention", parameters))
    if alpha := rope.get("alpha") if rope["rope_type"] == "dynamic" else None:
        dim = head_width(config)
        rope |= {
            "rope_type": "default",
            "rope_theta": rope["rope_theta"] * alpha ** (dim / (dim - 2)),
        }
    return rope


def widths_by_layer(config: Any) -> tuple[list[int], list[int], list[int]]:
    """Return query heads, KV heads and FFN channels of every layer."""
    layers = (
        config.per_layer_config if is_per_layer(config) else [config] * config.num_hidden_layers
    )
    num_heads = [layer.num_attention_heads for layer in layers]
    return (
        num_heads,
        [num_kv_heads(layer) for layer in layers],
        [_ffn_width(layer) for layer in layers],
    )


def num_kv_heads(config: Any) -> int:
    """Return the heads of keys and values; those of queries in families without grouped queries."""
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else config.num_attention_heads
    counts = (
        getattr(config, key, None)
        for key in ("num_key_value_heads", "num_kv_heads", "num_attention_heads")
    )
    return next(count for count in counts if count)


def num_experts(config: Any) -> int | None:
    """Return how many experts a layer has, None if it has none."""
    counts = (
        getattr(config, key, None)
        for key in ("num_local_experts", "num_experts", "n_routed_experts")
    )
    return next((count for count in counts if count), None)


def _ffn_width(sizes: Any) -> int:
    if hasattr(sizes, "n_inner"):
        return sizes.n_inner or 4 * sizes.hidden_size
    return sizes.ffn_hidden_size if hasattr(sizes, "ffn_hidden_size") else sizes.intermediate_size


ROTARY_TYPES = ("default", "linear", "llama3", "yarn")


def gguf_family(checkpoint: Checkpoint) -> GgufSpec:
    """Return llama.cpp's facts of the family. Raises ArchError for what llama.cpp cannot run."""
    return gguf_family_of(checkpoint.config, checkpoint.reference)


def gguf_family_of(config: Any, reference: str) -> GgufSpec:
    """Return llama.cpp's facts of a config's family. Raises as `gguf_family`, naming
    `reference`.
    """
    uniform, per_layer = gguf_specs(), is_per_layer(config)
    uneven = {key: row.per_layer for key, row in uniform.items() if row.per_layer}
    if config.model_type not in uniform:
        raise ArchError(
            f"{reference}: GGUF export knows the families {', '.join(sorted(uniform))}, "
            f"not '{config.model_type}'; llama.cpp's own script may know it."
        )
    if per_layer and config.model_type not in uneven:
        raise ArchError(
            f"{reference}: its layers have different widths, which llama.cpp runs of the families "
            f"{', '.join(sorted(uneven))}, not '{config.model_type}'; prune with budget uniform."
        )
    family = (uneven if per_layer else uniform)[config.model_type]
    where = f"{reference}: llama.cpp's {family.architecture}"
    if (
        family.full_width_heads
        and (width := config.num_attention_heads * head_width(config)) != config.hidden_size
    ):
        raise ArchError(
            f"{where} needs query heads * head_dim to be the hidden size {config.hidden_size}, got "
            f"{width}; prune groups other than attention heads."
        )
    for key, expected in _taken(config, family):
        got = _value(config, key)
        if got != expected and not (expected in (None, False) and got in (None, False)):
            raise ArchError(
                f"{where} takes {key} to be {expected}, the config says {got}; keep it in "
                "safetensors."
            )
    if (kind := rotary(config)["rope_type"]) not in ROTARY_TYPES:
        raise ArchError(
            f"{reference}: rope_type '{kind}' has no counterpart in GGUF; allowed: "
            f"{', '.join(ROTARY_TYPES)}."
        )
    return family


def _taken(config: Any, family: GgufSpec) -> Iterator[tuple[str, Any]]:
    """Yield (config key, value) of what llama.cpp assumes about this family."""
    yield from family.takes.items()
    yield from ((key, _value(config, other)) for key, other in family.same.items())
    yield from ((key, min(_value(config, key), limit)) for key, limit in family.at_most.items())
    layers = range(1, config.num_hidden_layers + 1)
    if period := family.window_period:
        yield (
            "layer_types",
            ["sliding_attention" if layer % period else "full_attention" for layer in layers],
        )
    if period := family.rotary_period:
        yield "no_rope_layers", [int(layer % period > 0) for layer in layers]
    if family.largest_num_layers is not None:
        is_largest = config.num_hidden_layers == family.largest_num_layers
        width = (
            config.hidden_size // config.num_attention_heads if is_largest else head_width(config)
        )
        yield "query_pre_attn_scalar", width


def _value(config: Any, key: str) -> Any:
    """Return the config's value of a key, None if missing; a dot leads into a dictionary."""
    name, _, inner = key.partition(".")
    value = getattr(config, name, None)
    if name == "hidden_activation":  # early configs of Gemma have hidden_act alone
        value = value or config.hidden_act
    return (value or {}).get(inner) if inner else value
