"""A checkpoint's tensors as llama.cpp wants them: its names, its order of rotary channels, its number formats.

In: tensors by their transformers names. Out: numpy arrays by their GGUF names, one at a time: a model is never in
memory as a whole. Vectors (norms, biases) stay float32, as llama.cpp requires.
"""

import math
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
from secateur.gguf_metadata import GgufFamily, head_dim, rotary

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # ours -> gguf.GGMLQuantizationType
OWN_TYPES = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}
LARGEST_F16 = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor to write. `source`: where it lies, None for the rotary factors, which are computed."""

    name: str  # transformers' name
    gguf_name: str
    shape: tuple[int, ...]
    type_name: str
    source: StoredTensor | None


def gguf_tensors(checkpoint: Checkpoint, family: GgufFamily, type_name: str) -> list[GgufTensor]:
    """List what the file will hold, layer by layer, tied weights once; read no weights.

    Raises CheckpointError if a row is no multiple of the type's block.
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    config: Any = checkpoint.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    stored, model = stored_tensors(checkpoint.directory), meta_model(checkpoint.config)
    found = []
    for name in model.state_dict():
        if name in model.all_tied_weights_keys:
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        shape = stored[name].shape
        found.append(GgufTensor(name, gguf_name, shape, type_name if len(shape) > 1 else "f32", stored[name]))
    if rotary(config)["rope_type"] == "llama3":
        found.append(GgufTensor("rope_freqs", "rope_freqs.weight", (head_dim(config) // 2,), "f32", None))
    block_size, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[TYPES[type_name]]]
    for tensor in found:
        if len(tensor.shape) > 1 and tensor.shape[-1] % block_size:
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


def read_gguf_arrays(tensors: list[GgufTensor], family: GgufFamily, config: PreTrainedConfig) -> Iterator[np.ndarray]:
    """Yield each tensor's array, read, reordered, norms shifted, and in its type.

    Raises NumericsError for NaN, infinity, or a weight beyond what f16 holds.
    """
    import gguf

    sizes: Any = config
    for tensor in tensors:
        values = llama3_factors(config) if tensor.source is None else read_tensor(tensor.source).float()
        _check_range(tensor, values)
        if family.interleaved_rotary and ".q_proj." in tensor.name:
            values = interleave_rotary(values, sizes.num_attention_heads)
        if family.interleaved_rotary and ".k_proj." in tensor.name:
            values = interleave_rotary(values, sizes.num_key_value_heads)
        if "norm." in tensor.name:
            values = values + family.norm_offset
        yield gguf.quantize(values.numpy(), gguf.GGMLQuantizationType[TYPES[tensor.type_name]])


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
