"""What llama.cpp computes for each model type, and a checkpoint's tensors as it wants them.

In: a checkpoint or its config. Out: llama.cpp's facts of the family, from `families/`, or a
sentence with the problem; tensors with llama.cpp's names, order of rotary channels and number
types. What a model consists of, `model.bind` finds in the modules.

Some types only llama.cpp's quantiser writes, as mixtures of others. `chosen_type` repeats the rule
of its llama-quant.cpp for q4_k_m (as of llama-cpp-python 0.3.36), so that its size is known before
a file is written.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, TypeAdapter
from torch import Tensor
from transformers import PreTrainedConfig

from secateur.errors import ArchError, CheckpointError, NumericsError
from secateur.model.checkpoint import Checkpoint, meta_model
from secateur.model.modeling_per_layer import is_per_layer
from secateur.model.stock import head_width
from secateur.model.tensors import StoredTensor, read_tensor, stored_tensors


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


# One expert's matrix in files that have them apart; Mixtral's names of its parts and llama.cpp's.
_EXPERT = re.compile(r"(model\.layers\.\d+\.).*\bexperts\.(\d+)\.(\w+)\.weight")
_EXPERT_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_LATENT, _LATENT_PART = ".kv_b_proj.", re.compile(r"\.([kv])_b_proj\.")
_QKV = re.compile(r"(.*\.self_attn\.)([qkv])_proj\.weight")
# Parameters that are no module's weight or bias, and the names that gguf looks for.
_RENAMED = (
    (re.compile(r"\.block_sparse_moe\.router\.weight$"), ".block_sparse_moe.router.layer.weight"),
    (re.compile(r"\.block_sparse_moe\.experts\.(?=gate_up_proj|down_proj)"), ".mlp.experts."),
    (re.compile(r"\.sinks$"), ".sinks.weight"),
    (re.compile(r"\.e_score_correction_bias$"), ".e_score_correction.bias"),
    (re.compile(r"\.(down_proj|gate_up_proj)$"), r".\1.weight"),
    (re.compile(r"\.(down_proj|gate_up_proj)_bias$"), r".\1.bias"),
)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file, by transformers' name and llama.cpp's.

    `sources`: several if experts are stacked or q, k and v joined; none of Llama 3's factors of
    rotary frequencies. `half`: gate (0) or input (1), where a checkpoint has both in one matrix.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]
    half: int | None
    gguf_name: str
    type_name: str


def _assembled(
    name: str, values: list[Tensor], half: int | None, family: GgufSpec, config: Any
) -> Tensor:
    """Return what a file has under a name: experts stacked, q, k and v joined, gate or input alone.

    Of latent attention: the matrices from the latent vector to each head's keys, transposed, or to
    its values.
    """
    if ".mlp.experts." in name and values[0].ndim == 2 and name.endswith(".weight"):
        whole = torch.stack(values)
    else:
        whole = torch.cat(values) if len(values) > 1 else values[0]  # an embedding is not copied
    if name.endswith(".weight") and name.split(".")[-2] in family.transposed:
        whole = whole.transpose(-1, -2)
    if latent := _LATENT_PART.search(name):
        by_head = whole.unflatten(0, (config.num_attention_heads, -1))
        keys, values_of_heads = by_head.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        return keys.transpose(1, 2) if latent[1] == "k" else values_of_heads
    if half is None:
        return whole
    rows = -1 if name.endswith(".bias") else -2
    if family.alternating_gate:
        return whole.unflatten(rows, (-1, 2)).select(rows, half)
    return whole.chunk(2, dim=rows)[half]


def _sources(
    stored: Mapping[str, StoredTensor], model: Any, family: GgufSpec
) -> Iterator[tuple[str, tuple[StoredTensor, ...], int | None]]:
    stacks: dict[str, dict[int, StoredTensor]] = {}
    for stored_name, tensor in stored.items():
        if stored_name in model.all_tied_weights_keys or "rotary_emb" in stored_name:
            continue
        name = stored_name
        for pattern, new in _RENAMED:
            name = pattern.sub(new, name)
        if expert := _EXPERT.fullmatch(name):
            layer, index, part = expert.groups()
            stack = stacks.setdefault(
                f"{layer}mlp.experts.{_EXPERT_PARTS.get(part, part)}.weight", {}
            )
            stack[int(index)] = tensor
        elif "experts.gate_up_proj." in name or (
            family.fused_gate and f".{family.fused_gate}." in name
        ):
            experts = re.sub(r"(layers\.\d+\.).*", r"\1mlp.experts", name)
            kind = name.rpartition(".")[2]
            yield f"{experts}.gate_proj.{kind}", (tensor,), 0
            yield f"{experts}.up_proj.{kind}", (tensor,), 1
        elif family.fused_qkv and (fused := _QKV.fullmatch(name)):
            if fused[2] == "q":
                joined = tuple(stored[f"{fused[1]}{part}_proj.weight"] for part in "qkv")
                yield f"{fused[1]}qkv_proj.weight", joined, None
        elif _LATENT in name:
            yield name.replace(_LATENT, ".k_b_proj."), (tensor,), None
            yield name.replace(_LATENT, ".v_b_proj."), (tensor,), None
        else:
            yield name, (tensor,), None
    for name, stack in stacks.items():
        yield name, tuple(stack[index] for index in sorted(stack)), None


TYPES = ("f32", "f16", "bf16", "q8_0")  # that need no llama.cpp
OWN_TYPES = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}
LARGEST_F16 = torch.finfo(torch.float16).max
# Small tensors, some of which llama.cpp takes in float32 only.
_ALWAYS_F32 = re.compile(r"\.ffn_gate_inp(_shexp)?\.|^position_embd\.|\.bias$")
_FACTORS = "rope_freqs"


def gguf_tensors(checkpoint: Checkpoint, family: GgufSpec, type_name: str) -> list[GgufTensor]:
    """List the file's tensors, tied weights once; read no weights.

    Raises CheckpointError if a row is no multiple of the type's block.
    """
    stored, model = stored_tensors(checkpoint.directory), meta_model(checkpoint.config)
    tensors = tensors_of(stored, model, family, type_name)
    for tensor in tensors:
        block_size, width = gguf_block(tensor.type_name)[0], tensor.shape[-1]
        if width % block_size:
            pruned = (
                ""
                if width == checkpoint.config.hidden_size
                else f", or prune with align: {block_size}"
            )
            raise CheckpointError(
                f"{checkpoint.reference}: {tensor.name} has rows of {width}, which {type_name} "
                f"stores in blocks of {block_size}; export as f16 or bf16{pruned}."
            )
    return tensors


def planned_tensors(model: Any, family: GgufSpec, file_type: str) -> list[GgufTensor]:
    """List the tensors that a file of `model`, which may be on meta, will have, in their types.

    `file_type`: one of `TYPES` or `TOLD`.
    """
    stored = {
        key: StoredTensor(Path(), key, tensor.dtype, tuple(tensor.shape))
        for key, tensor in model.state_dict().items()
    }
    if file_type in TYPES:
        return tensors_of(stored, model, family, file_type)
    config = model.config
    tensors = tensors_of(stored, model, family, OWN_TYPES.get(str(config.dtype), "f32"))
    assert file_type == TOLD
    is_tied = all(tensor.gguf_name != "output.weight" for tensor in tensors)
    (num_heads, *_), (num_kv_heads, *_), _ = widths_by_layer(config)
    queries = num_heads // (
        1 if family.latent_attention else num_kv_heads
    )  # it has one KV head in llama.cpp
    shape = Shape(
        family.architecture, config.num_hidden_layers, num_experts(config) or 1, queries, is_tied
    )
    return [
        tensor
        if stays_as_it_is(tensor.gguf_name, tensor.shape)
        else replace(
            tensor, type_name=fitting_type(chosen_type(tensor.gguf_name, shape), tensor.shape[-1])
        )
        for tensor in tensors
    ]


def tensors_of(
    stored: Mapping[str, StoredTensor], model: Any, family: GgufSpec, type_name: str
) -> list[GgufTensor]:
    """List the file's tensors of a model whose checkpoint has these; its rows may not fit the
    type.
    """
    import gguf

    architecture = next(
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture
    )
    config: Any = model.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = []
    for name, sources, half in _sources(stored, model, family):
        shapes = [torch.empty(source.shape, device="meta") for source in sources]
        shape = tuple(_assembled(name, shapes, half, family, config).shape)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        small = len(shape) == 1 or _ALWAYS_F32.search(gguf_name)
        tensors.append(
            GgufTensor(name, shape, sources, half, gguf_name, "f32" if small else type_name)
        )
    if rotary(config)["rope_type"] == "llama3":
        shape = (head_width(config) // 2,)
        tensors.append(GgufTensor(_FACTORS, shape, (), None, f"{_FACTORS}.weight", "f32"))
    return tensors


def gguf_block(type_name: str) -> tuple[int, int]:
    """Return the numbers in a block of a tensor's type, and its bytes."""
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name.upper()]]


def num_gguf_bytes(tensor: GgufTensor) -> int:
    """Return the bytes that the tensor takes in the file."""
    block_size, block_bytes = gguf_block(tensor.type_name)
    return math.prod(tensor.shape) // block_size * block_bytes


def gguf_array(tensor: GgufTensor, family: GgufSpec, config: PreTrainedConfig) -> np.ndarray:
    """Return the tensor's array: reordered, norms shifted, in its type.

    Raises NumericsError for NaN, infinity, or a weight beyond what f16 holds.
    """
    import gguf

    if tensor.sources:
        parts = [read_tensor(source).float() for source in tensor.sources]
        values = _assembled(tensor.name, parts, tensor.half, family, config)
    else:
        values = llama3_factors(config)
    _check_range(tensor, values)
    values = _reordered(values, tensor.name, family, config)
    return gguf.quantize(
        values.contiguous().numpy(), gguf.GGMLQuantizationType[tensor.type_name.upper()]
    )


def _reordered(values: Tensor, name: str, family: GgufSpec, config: PreTrainedConfig) -> Tensor:
    """Return the values with llama.cpp's order of rotary channels and its convention for norms."""
    if ".query_key_value." in name:
        return join_qkv(values, num_kv_heads(config), head_width(config))
    if family.interleaved_rotary and (".q_proj." in name or ".k_proj." in name):
        return interleave_rotary(values, len(values) // head_width(config))
    return values + family.norm_offset if name.endswith("norm.weight") else values


def interleave_rotary(rows: Float[Tensor, "... I"], num_heads: int) -> Float[Tensor, "... I"]:
    """Reorder each head's rows from halves (0..d/2-1, d/2..d-1) to pairs (0, d/2, 1, d/2+1...)."""
    halves = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def join_qkv(rows: Float[Tensor, "... I"], num_kv_heads: int, dim: int) -> Float[Tensor, "... I"]:
    """Reorder rows from groups (queries, key, value) to all queries, all keys, all values."""
    groups = rows.reshape(num_kv_heads, -1, dim, *rows.shape[1:])
    return torch.cat(
        [part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])]
    )


def llama3_factors(config: PreTrainedConfig) -> Float[Tensor, " F"]:
    """Return Llama 3's factors of rotary frequencies: theta^(-2i/d) / transformers' frequency."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = head_width(config)
    plain = rotary(config)["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return (plain / slowed.double()).float()


def _check_range(tensor: GgufTensor, values: Tensor) -> None:
    largest = values.abs().max().item() if values.numel() else 0.0
    if not math.isfinite(largest):
        raise NumericsError(
            f"weight {tensor.name} holds NaN or infinity; export an intact checkpoint."
        )
    if tensor.type_name == "f16" and largest > LARGEST_F16:
        raise NumericsError(
            f"weight {tensor.name} reaches {largest:.3g}, beyond f16's {LARGEST_F16:g}; export as "
            "bf16."
        )


# Those whose quality was measured. llama.cpp makes all others of an f16.
QUANTISED = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
# The one whose size is told.
TOLD = "q4_k_m"
# What a tensor gets whose rows are no multiple of its type's block, 256; else f16.
_WIDER = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_NOT_QUANTISED = re.compile(r"_norm\.weight$|\.ffn_gate_inp|^position_embd\.|(?<!weight)$")
_VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")
# Those of llama.cpp's architectures in which 80 layers mean 70B, unless every head has its own
# keys.
_SEVENTY_B = {"llama", "deci", "olmo", "qwen2"}


@dataclass(frozen=True, slots=True)
class Shape:
    """What the rule asks of a model. `queries`: of one KV head, in the first layer."""

    architecture: str
    num_layers: int
    num_experts: int
    queries: int
    is_tied: bool

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for Llama 70B."""
        grouped = self.architecture != "llama" or self.queries > 1
        return self.architecture in _SEVENTY_B and self.num_layers == 80 and grouped


def stays_as_it_is(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the quantiser copies a tensor: vectors, norms, routers and positions."""
    return len(shape) < 2 or _NOT_QUANTISED.search(name) is not None


def chosen_type(name: str, model: Shape) -> str:
    """Return the type of a tensor that q4_k_m quantises, if its rows suit it: see
    `fitting_type`.
    """
    is_falcon, of_eight = model.architecture == "falcon", model.num_experts == 8
    if name == "output.weight" or (name == "token_embd.weight" and model.is_tied):
        return "q8_0" if is_falcon else "q6_k"
    if not (numbered := re.match(r"blk\.(\d+)\.", name)):
        return "q4_k"
    layer, rest, first = int(numbered[1]), name[numbered.end() :], model.num_layers // 8
    # The first and last eighths of the layers, and every third between them, get more bits.
    more = layer < first or layer >= 7 * model.num_layers // 8 or (layer - first) % 3 == 2
    if of_eight and rest in (*_VALUES, "attn_k.weight"):
        return "q8_0"
    if rest in _VALUES:
        return "q6_k" if more else "q5_k" if model.is_70b else "q4_k"
    if "ffn_down" in rest and more:
        return "q5_k" if is_falcon and layer >= model.num_layers // 16 else "q6_k"
    return "q5_k" if of_eight and rest == "attn_output.weight" else "q4_k"


def fitting_type(chosen: str, row: int) -> str:
    """Return the type in which llama.cpp stores rows of that length: a wider one if they do not
    fit.
    """
    wider = chosen if row % gguf_block(chosen)[0] == 0 else _WIDER.get(chosen, chosen)
    return wider if row % gguf_block(wider)[0] == 0 else "f16"


def quantise(source: Path, file: Path, type_name: str, reference: str) -> None:
    """Write the GGUF file `source`, in f32, f16 or bf16, as `file` by llama.cpp's quantiser.

    Raises CheckpointError, naming the model by `reference`, with llama.cpp's last words if it
    fails.
    """
    import ctypes

    import gguf
    import llama_cpp  # pyright: ignore[reportMissingImports]  # a package that few have
    from llama_cpp import _logger  # pyright: ignore[reportMissingImports]

    messages: list[str] = []
    listener = llama_cpp.llama_log_callback(
        lambda level, text, _: messages.append(text.decode(errors="replace"))
    )
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{type_name.upper()}"])
    params.nthread = torch.get_num_threads()
    llama_cpp.llama_log_set(listener, ctypes.c_void_p(0))
    try:
        status = llama_cpp.llama_model_quantize(bytes(source), bytes(file), ctypes.byref(params))
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
    if status != 0:
        last = next(
            (line for line in reversed("".join(messages).splitlines()) if line.strip(" =")),
            f"status {status}",
        )
        raise CheckpointError(
            f"{reference}: llama.cpp cannot write it as {type_name} ({last.strip()})."
        )
