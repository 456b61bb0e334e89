"""A checkpoint's tensors as llama.cpp wants them: its names, its order of rotary channels, its number formats.

In: tensors by their names in the file. Out: numpy arrays by their GGUF names, one at a time: a model is never in
memory as a whole. Vectors (norms, biases) stay float32, as llama.cpp requires.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig

from secateur.checkpoint import Checkpoint, meta_model
from secateur.checkpoint_tensors import StoredTensor, read_tensor, stored_tensors
from secateur.errors import CheckpointError, NumericsError
from secateur.gguf_family import GgufFamily, head_dim, layer_widths, rotary

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # ours -> gguf.GGMLQuantizationType
OWN_TYPES = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}
LARGEST_F16 = torch.finfo(torch.float16).max


# Too small to gain from a smaller type, and llama.cpp takes some of them in float32 only.
_ALWAYS_F32 = re.compile(r"\.ffn_gate_inp(_shexp)?\.|^position_embd\.")
# Files that keep every expert apart: Mixtral's names of the matrices, and the name under which llama.cpp has the stack.
_EXPERT = re.compile(r"(model\.layers\.\d+\.).*\bexperts\.(\d+)\.(\w+)\.weight")
_EXPERT_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_QKV = re.compile(r"(.*\.self_attn\.)[qkv]_proj\.weight")
_FACTORS = "rope_freqs"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor to write. `sources`: where it lies, several where experts are stacked or q, k and v joined; none for
    computed factors and for the zeros of a sublayer that is not there.

    `half`: which half of the rows is meant, where a file keeps gate and input in one matrix.
    """

    name: str  # transformers' name
    gguf_name: str
    shape: tuple[int, ...]
    type_name: str
    sources: tuple[StoredTensor, ...]
    half: int | None = None


def gguf_tensors(checkpoint: Checkpoint, family: GgufFamily, type_name: str) -> list[GgufTensor]:
    """List what the file will hold, tied weights once; read no weights.

    Raises CheckpointError if a row is no multiple of the type's block.
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    config: Any = checkpoint.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    parts = [
        (name, sources, half, _shape(name, sources, half, family)) for name, sources, half in _parts(checkpoint, family)
    ]
    parts += [(name, (), None, shape) for name, shape in _stand_ins(config, family)]
    found = []
    for name, sources, half, shape in parts:
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        small = len(shape) == 1 or _ALWAYS_F32.search(gguf_name)
        found.append(GgufTensor(name, gguf_name, shape, "f32" if small else type_name, sources, half))
    if rotary(config)["rope_type"] == "llama3":
        found.append(GgufTensor(_FACTORS, "rope_freqs.weight", (head_dim(config) // 2,), "f32", ()))
    for tensor in found:
        block_size, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[TYPES[tensor.type_name]]]
        if tensor.shape[-1] % block_size:
            raise CheckpointError(
                f"{checkpoint.reference}: {tensor.name} has rows of {tensor.shape[-1]}, which {type_name} stores in "
                f"blocks of {block_size}; export as f16 or bf16, or prune with align: {block_size}."
            )
    return found


def _parts(checkpoint: Checkpoint, family: GgufFamily) -> Iterator[tuple[str, tuple[StoredTensor, ...], int | None]]:
    """Yield what to write by name: stored tensors, stacks of the experts' matrices, halves of fused ones."""
    stored, model = stored_tensors(checkpoint.directory), meta_model(checkpoint.config)
    stacks: dict[str, dict[int, StoredTensor]] = {}
    for name, tensor in stored.items():
        if name in model.all_tied_weights_keys or "rotary_emb" in name:
            continue
        if expert := _EXPERT.fullmatch(name):
            layer, index, part = expert.groups()
            stack = stacks.setdefault(f"{layer}mlp.experts.{_EXPERT_PARTS.get(part, part)}.weight", {})
            stack[int(index)] = tensor
        elif family.fused_gate and f".{family.fused_gate}." in name:
            experts = re.sub(r"(layers\.\d+\.).*", r"\1mlp.experts", name)
            yield f"{experts}.gate_proj.weight", (tensor,), 0
            yield f"{experts}.up_proj.weight", (tensor,), 1
        elif family.fused_qkv and (joined := _QKV.fullmatch(name)):
            if name.endswith("q_proj.weight"):
                yield (
                    f"{joined[1]}qkv_proj.weight",
                    tuple(stored[f"{joined[1]}{part}_proj.weight"] for part in "qkv"),
                    None,
                )
        else:
            yield name, (tensor,), None
    for name, stack in stacks.items():
        yield name, tuple(stack[index] for index in sorted(stack)), None


def _stand_ins(config: PreTrainedConfig, family: GgufFamily) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of the zeros that stand where a layer has no attention or MLP and llama.cpp needs one."""
    sizes: Any = config
    hidden, dim = sizes.hidden_size, head_dim(config)
    for index, widths in enumerate(layer_widths(config, family)):
        layer = f"model.layers.{index}"
        if "mlp" in widths.absent:
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
            yield f"{layer}.mlp.gate_proj.weight", (widths.ffn_width, hidden)
            yield f"{layer}.mlp.up_proj.weight", (widths.ffn_width, hidden)
            yield f"{layer}.mlp.down_proj.weight", (hidden, widths.ffn_width)
        if "attention" in widths.absent and widths.num_heads:
            yield f"{layer}.input_layernorm.weight", (hidden,)
            if family.fused_qkv:
                yield f"{layer}.self_attn.qkv_proj.weight", (3 * dim, hidden)
                yield f"{layer}.self_attn.q_norm.weight", (dim,)
                yield f"{layer}.self_attn.k_norm.weight", (dim,)
            else:
                yield from ((f"{layer}.self_attn.{part}_proj.weight", (dim, hidden)) for part in "qkv")
            yield f"{layer}.self_attn.o_proj.weight", (hidden, dim)


def _shape(name: str, sources: tuple[StoredTensor, ...], half: int | None, family: GgufFamily) -> tuple[int, ...]:
    shape = (len(sources), *sources[0].shape) if _is_stack(name, half) else sources[0].shape
    if half is not None:
        return (*shape[:-2], shape[-2] // 2, shape[-1])
    if name.endswith(".qkv_proj.weight"):
        return (sum(source.shape[0] for source in sources), shape[1])
    return shape[::-1] if _is_conv1d(name, family) else shape


def _is_stack(name: str, half: int | None) -> bool:
    """Say whether experts lie apart in the file, be it one alone."""
    return ".mlp.experts." in name and half is None


def _is_conv1d(name: str, family: GgufFamily) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in family.conv1d


def num_gguf_bytes(tensor: GgufTensor) -> int:
    """Return the bytes that the tensor takes in the file."""
    import gguf

    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[TYPES[tensor.type_name]]]
    return math.prod(tensor.shape) // block_size * block_bytes


def read_gguf_arrays(tensors: list[GgufTensor], family: GgufFamily, config: PreTrainedConfig) -> Iterator[np.ndarray]:
    """Yield each tensor's array, read, reordered, norms shifted, and in its type.

    Raises NumericsError for NaN, infinity, or a weight beyond what f16 holds.
    """
    import gguf

    for tensor in tensors:
        values = llama3_factors(config) if tensor.name == _FACTORS else _read(tensor, family)
        _check_range(tensor, values)
        values = _as_llama_cpp_has_it(values, tensor.name, family, config)
        yield gguf.quantize(values.contiguous().numpy(), gguf.GGMLQuantizationType[TYPES[tensor.type_name]])


def _read(tensor: GgufTensor, family: GgufFamily) -> Tensor:
    if not tensor.sources:
        return torch.zeros(tensor.shape)
    values = [read_tensor(source).float() for source in tensor.sources]
    whole = torch.stack(values) if _is_stack(tensor.name, tensor.half) else torch.cat(values)
    if tensor.half is not None:
        return whole.chunk(2, dim=-2)[tensor.half]
    return whole.T if _is_conv1d(tensor.name, family) else whole


def _as_llama_cpp_has_it(values: Tensor, name: str, family: GgufFamily, config: PreTrainedConfig) -> Tensor:
    """Return the values with rows of q and k in llama.cpp's order of rotary channels, and norms by its convention."""
    if family.interleaved_rotary and (".q_proj." in name or ".k_proj." in name):
        return interleave_rotary(values, len(values) // head_dim(config))
    return values + family.norm_offset if name.endswith("norm.weight") else values


def interleave_rotary(rows: Float[Tensor, "... I"], num_heads: int) -> Float[Tensor, "... I"]:
    """Reorder each head's rows from halves (0..d/2-1, d/2..d-1) to pairs (0, d/2, 1, d/2+1, ...)."""
    halves = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def llama3_factors(config: PreTrainedConfig) -> Float[Tensor, " F"]:
    """Return by how much Llama 3 slows each rotary frequency: theta^(-2i/d) / the frequency transformers uses."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = head_dim(config)
    plain = rotary(config)["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return (plain / slowed.double()).float()


def _check_range(tensor: GgufTensor, values: Tensor) -> None:
    largest = values.abs().max().item() if values.numel() else 0.0
    if not math.isfinite(largest):
        raise NumericsError(f"weight {tensor.name} holds NaN or infinity; export an intact checkpoint.")
    if tensor.type_name == "f16" and largest > LARGEST_F16:
        raise NumericsError(
            f"weight {tensor.name} reaches {largest:.3g}, beyond f16's {LARGEST_F16:g}; export as bf16."
        )
