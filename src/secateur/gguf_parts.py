"""Which stored tensors make up which of a GGUF file: experts stacked, q, k and v joined, fused matrices taken apart.

In: a checkpoint. Out: parts with transformers' names as `gguf` knows them, and their values, read one at a time.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from secateur.arch_spec import GgufSpec
from secateur.checkpoint import Checkpoint, meta_model
from secateur.checkpoint_tensors import StoredTensor, read_tensor, stored_tensors

# Files that keep every expert apart: Mixtral's names of the matrices, and the name under which llama.cpp has the stack.
_EXPERT = re.compile(r"(model\.layers\.\d+\.).*\bexperts\.(\d+)\.(\w+)\.weight")
_EXPERT_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_LATENT = ".kv_b_proj.weight"
_QKV = re.compile(r"(.*\.self_attn\.)([qkv])_proj\.weight")
# Parameters that are no module's weight or bias, and what gguf looks for.
_RENAMED = (
    (re.compile(r"\.sinks$"), ".sinks.weight"),
    (re.compile(r"\.e_score_correction_bias$"), ".e_score_correction.bias"),
    (re.compile(r"\.(down_proj|gate_up_proj)$"), r".\1.weight"),
    (re.compile(r"\.(down_proj|gate_up_proj)_bias$"), r".\1.bias"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the file. `sources`: where it lies, several where experts are stacked or q, k and v joined.

    `half`: which of gate and input is meant, where a file keeps both in one matrix.
    """

    name: str  # transformers' name
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]
    half: int | None = None


def gguf_parts(checkpoint: Checkpoint, family: GgufSpec) -> Iterator[Part]:
    """Yield what the file will hold, tied weights once; read no weights."""
    for name, sources, half in _sources(checkpoint, family):
        if name.endswith(_LATENT):
            yield from _latent_parts(name, sources, checkpoint.config)
        else:
            yield Part(name, _shape(name, sources, half, family), sources, half)


def read_part(part: Part, family: GgufSpec) -> Tensor:
    """Return the part's values in float32, rows and channels as transformers has them."""
    values = [read_tensor(source).float() for source in part.sources]
    if _is_stack(part.name, part.sources):
        whole = torch.stack(values)
    else:
        whole = torch.cat(values) if len(values) > 1 else values[0]  # an embedding is not copied
    if family.latent_attention and "_b_proj." in part.name and len(part.shape) == 3:
        return _read_latent(part, whole)
    if _is_transposed(part.name, family):
        whole = whole.transpose(-1, -2)
    if part.half is None:
        return whole
    rows = -1 if part.name.endswith(".bias") else -2
    if family.alternating_gate:
        return whole.unflatten(rows, (-1, 2)).select(rows, part.half)
    return whole.chunk(2, dim=rows)[part.half]


def _sources(checkpoint: Checkpoint, family: GgufSpec) -> Iterator[tuple[str, tuple[StoredTensor, ...], int | None]]:
    stored, model = stored_tensors(checkpoint.directory), meta_model(checkpoint.config)
    stacks: dict[str, dict[int, StoredTensor]] = {}
    for stored_name, tensor in stored.items():
        if stored_name in model.all_tied_weights_keys or "rotary_emb" in stored_name:
            continue
        name = _renamed(stored_name)
        if expert := _EXPERT.fullmatch(name):
            layer, index, part = expert.groups()
            stack = stacks.setdefault(f"{layer}mlp.experts.{_EXPERT_PARTS.get(part, part)}.weight", {})
            stack[int(index)] = tensor
        elif family.fused_gate and f".{family.fused_gate}." in name:
            experts = re.sub(r"(layers\.\d+\.).*", r"\1mlp.experts", name)
            kind = name.rpartition(".")[2]
            yield f"{experts}.gate_proj.{kind}", (tensor,), 0
            yield f"{experts}.up_proj.{kind}", (tensor,), 1
        elif family.fused_qkv and (found := _QKV.fullmatch(name)):
            if found[2] == "q":
                joined = tuple(stored[f"{found[1]}{part}_proj.weight"] for part in "qkv")
                yield f"{found[1]}qkv_proj.weight", joined, None
        else:
            yield name, (tensor,), None
    for name, stack in stacks.items():
        yield name, tuple(stack[index] for index in sorted(stack)), None


def _latent_parts(name: str, sources: tuple[StoredTensor, ...], config: PreTrainedConfig) -> Iterator[Part]:
    """Yield what reads a head's keys off the latent vector, transposed, and what reads its values."""
    sizes: Any = config
    heads, latent = sizes.num_attention_heads, sizes.kv_lora_rank
    layer = name.removesuffix(_LATENT)
    yield Part(f"{layer}.k_b_proj.weight", (heads, latent, sizes.qk_nope_head_dim), sources)
    yield Part(f"{layer}.v_b_proj.weight", (heads, sizes.v_head_dim, latent), sources)


def _read_latent(part: Part, whole: Tensor) -> Tensor:
    by_head = whole.reshape(part.shape[0], -1, whole.shape[1])
    if ".k_b_proj." in part.name:
        return by_head[:, : part.shape[2]].transpose(1, 2)
    return by_head[:, -part.shape[1] :]


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED:
        name = pattern.sub(new, name)
    return name


def _shape(name: str, sources: tuple[StoredTensor, ...], half: int | None, family: GgufSpec) -> tuple[int, ...]:
    first = sources[0].shape
    if _is_stack(name, sources):
        return (len(sources), *first)
    if len(sources) > 1:
        return (sum(source.shape[0] for source in sources), *first[1:])
    shape = (*first[:-2], first[-1], first[-2]) if _is_transposed(name, family) else first
    if half is None:
        return shape
    return (*shape[:-1], shape[-1] // 2) if name.endswith(".bias") else (*shape[:-2], shape[-2] // 2, shape[-1])


def _is_stack(name: str, sources: tuple[StoredTensor, ...]) -> bool:
    """Say whether experts lie apart in the file, be it one alone."""
    return ".mlp.experts." in name and len(sources[0].shape) == 2 and name.endswith(".weight")


def _is_transposed(name: str, family: GgufSpec) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in family.transposed
