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

from secateur.arch_spec import GgufSpec
from secateur.checkpoint import Checkpoint
from secateur.errors import CheckpointError, NumericsError
from secateur.gguf_family import head_dim, num_kv_heads, rotary
from secateur.gguf_parts import Part, gguf_parts, read_part

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # ours -> gguf.GGMLQuantizationType
OWN_TYPES = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}
LARGEST_F16 = torch.finfo(torch.float16).max


# Too small to gain from a smaller type, and llama.cpp takes some of them in float32 only.
_ALWAYS_F32 = re.compile(r"\.ffn_gate_inp(_shexp)?\.|^position_embd\.|\.bias$")
_FACTORS = "rope_freqs"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor to write. `part` None: the factors by which Llama 3 slows its rotary frequencies."""

    part: Part | None
    gguf_name: str
    shape: tuple[int, ...]
    type_name: str

    @property
    def name(self) -> str:
        """Transformers' name."""
        return self.part.name if self.part else _FACTORS


def gguf_tensors(checkpoint: Checkpoint, family: GgufSpec, type_name: str) -> list[GgufTensor]:
    """List what the file will hold, tied weights once; read no weights.

    Raises CheckpointError if a row is no multiple of the type's block.
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    config: Any = checkpoint.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = []
    for part in gguf_parts(checkpoint, family):
        gguf_name = names.get_name(part.name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, part.name
        small = len(part.shape) == 1 or _ALWAYS_F32.search(gguf_name)
        found.append(GgufTensor(part, gguf_name, part.shape, "f32" if small else type_name))
    if rotary(config)["rope_type"] == "llama3":
        found.append(GgufTensor(None, f"{_FACTORS}.weight", (head_dim(config) // 2,), "f32"))
    for tensor in found:
        block_size, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[TYPES[tensor.type_name]]]
        if tensor.shape[-1] % block_size:
            raise CheckpointError(
                f"{checkpoint.reference}: {tensor.name} has rows of {tensor.shape[-1]}, which {type_name} stores in "
                f"blocks of {block_size}; export as f16 or bf16, or prune with align: {block_size}."
            )
    return found


def num_gguf_bytes(tensor: GgufTensor) -> int:
    """Return the bytes that the tensor takes in the file."""
    import gguf

    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[TYPES[tensor.type_name]]]
    return math.prod(tensor.shape) // block_size * block_bytes


def read_gguf_arrays(tensors: list[GgufTensor], family: GgufSpec, config: PreTrainedConfig) -> Iterator[np.ndarray]:
    """Yield each tensor's array, read, reordered, norms shifted, and in its type.

    Raises NumericsError for NaN, infinity, or a weight beyond what f16 holds.
    """
    import gguf

    for tensor in tensors:
        values = read_part(tensor.part, family) if tensor.part else llama3_factors(config)
        _check_range(tensor, values)
        values = _as_llama_cpp_has_it(values, tensor.name, family, config)
        yield gguf.quantize(values.contiguous().numpy(), gguf.GGMLQuantizationType[TYPES[tensor.type_name]])


def _as_llama_cpp_has_it(values: Tensor, name: str, family: GgufSpec, config: PreTrainedConfig) -> Tensor:
    """Return the values with rows of q and k in llama.cpp's order of rotary channels, and norms by its convention."""
    if ".query_key_value." in name:
        return join_qkv(values, num_kv_heads(config), head_dim(config))
    if family.interleaved_rotary and (".q_proj." in name or ".k_proj." in name):
        return interleave_rotary(values, len(values) // head_dim(config))
    return values + family.norm_offset if name.endswith("norm.weight") else values


def interleave_rotary(rows: Float[Tensor, "... I"], num_heads: int) -> Float[Tensor, "... I"]:
    """Reorder each head's rows from halves (0..d/2-1, d/2..d-1) to pairs (0, d/2, 1, d/2+1, ...)."""
    halves = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def join_qkv(rows: Float[Tensor, "... I"], num_kv_heads: int, dim: int) -> Float[Tensor, "... I"]:
    """Reorder rows from groups (query heads, their key head, their value head) to all queries, all keys, all values."""
    groups = rows.reshape(num_kv_heads, -1, dim, *rows.shape[1:])
    return torch.cat([part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])])


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
