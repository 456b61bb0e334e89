"""Types of GGUF files that llama.cpp's quantiser writes: the quantiser, and which types q4_k_m means.

Such a type is a mixture. `chosen_type` repeats the rule of llama.cpp's llama-quant.cpp for q4_k_m (as
of llama-cpp-python 0.3.36), so that its size is known before a file is written.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from secateur.errors import CheckpointError
from secateur.formats.serving import layer_widths, num_experts

# Those whose quality was measured. llama.cpp makes all others of an f16.
QUANTISED = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
# The one whose size is told.
TOLD = "q4_k_m"
# What a tensor gets whose rows are no multiple of its type's block, 256; else f16.
_WIDER = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_NOT_QUANTISED = re.compile(r"_norm\.weight$|\.ffn_gate_inp|^position_embd\.|(?<!weight)$")
_VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")
# Those of llama.cpp's architectures in which 80 layers mean 70B, unless every head has its own keys.
_SEVENTY_B = {"llama", "deci", "olmo", "qwen2"}


@dataclass(frozen=True, slots=True)
class Shape:
    """What the rule asks of a model. `queries`: of one KV head, in the first layer."""

    architecture: str
    num_layers: int
    num_experts: int
    queries: int
    is_tied: bool

    @classmethod
    def of(cls, config: PreTrainedConfig, architecture: str, *, is_tied: bool, latent: bool) -> "Shape":
        """Read it from a config. `latent`: attention has one KV head in llama.cpp."""
        sizes: Any = config
        (num_heads, *_), (num_kv_heads, *_), _ = layer_widths(config)
        queries = num_heads // (1 if latent else num_kv_heads)
        return cls(architecture, sizes.num_hidden_layers, num_experts(config) or 1, queries, is_tied)

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for Llama 70B."""
        grouped = self.architecture != "llama" or self.queries > 1
        return self.architecture in _SEVENTY_B and self.num_layers == 80 and grouped


def stays_as_it_is(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the quantiser copies a tensor: vectors, norms, routers and positions."""
    return len(shape) < 2 or _NOT_QUANTISED.search(name) is not None


def chosen_type(name: str, model: Shape) -> str:
    """Return the type of a tensor that q4_k_m quantises, if its rows suit it: see `fitting_type`."""
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


def fitting_type(chosen: str, row: int, block_size: Callable[[str], int]) -> str:
    """Return the type in which llama.cpp stores rows of that length: a wider one if they do not fit."""
    wider = chosen if row % block_size(chosen) == 0 else _WIDER.get(chosen, chosen)
    return wider if row % block_size(wider) == 0 else "f16"


def quantise(
    source: Path, file: Path, type_name: str, reference: str, importance: Mapping[str, np.ndarray] | None
) -> None:
    """Write the GGUF file `source`, in f32, f16 or bf16, as `file` by llama.cpp's quantiser.

    `importance`: of the columns of tensors, by their names in the file, float32. Raises
    CheckpointError, naming the model by `reference`, with llama.cpp's last words if it fails.
    """
    import ctypes

    import gguf
    import llama_cpp  # pyright: ignore[reportMissingImports]  # a package that few have
    from llama_cpp import _logger  # pyright: ignore[reportMissingImports]

    messages: list[str] = []
    listener = llama_cpp.llama_log_callback(lambda level, text, _: messages.append(text.decode(errors="replace")))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{type_name.upper()}"])
    params.nthread = torch.get_num_threads()
    if importance:
        entry, number = llama_cpp.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
        entries = [entry(name.encode(), means.ctypes.data_as(number), means.size) for name, means in importance.items()]
        params.imatrix = (entry * (len(entries) + 1))(*entries)  # the last one, without a name, is the end
    llama_cpp.llama_log_set(listener, ctypes.c_void_p(0))
    try:
        status = llama_cpp.llama_model_quantize(bytes(source), bytes(file), ctypes.byref(params))
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
    if status != 0:
        last = next((line for line in reversed("".join(messages).splitlines()) if line.strip(" =")), f"status {status}")
        raise CheckpointError(f"{reference}: llama.cpp cannot write it as {type_name} ({last.strip()}).")
