"""The tensors of a checkpoint directory: those of its safetensors files, and those of the model
that they make.

The headers alone reveal a missing shard, a truncated file and every tensor's shape; safetensors
checks them. Tensors are read into ordinary memory, or mapped from their files, where they occupy
page cache only.

Quantised ones are made bfloat16, tensor by tensor, when transformers' loader asks for them. The
arithmetic is that of transformers and of compressed-tensors; of GPTQ and AWQ, which neither
computes without a GPU, it is here. Not handled: pickle files (refused), and weights that are
rotated, sparse, or of the methods that `QUANTISATIONS` does not name.
"""

import importlib.util
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.modeling_utils import str_to_torch_dtype

from secateur.errors import CheckpointError, one_line
from secateur.model.stock import BAD_VALUE

_DTYPES = {**str_to_torch_dtype, "F8_E8M0": torch.float8_e8m0fnu}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What one tensor of a file is."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint by name, from the headers alone.

    Raises CheckpointError if there are no safetensors weights, or a shard is missing or damaged.
    """
    return tensors_in(_weight_files(directory))


def read_tensor(stored: StoredTensor, *, mapped: bool = False) -> Tensor:
    """Return the tensor in its own memory, or `mapped`: a view of its file; writing to it copies
    its pages.

    Raises CheckpointError if the file has changed.
    """
    try:
        with safe_open(stored.file, framework="pt") as opened:
            tensor = opened.get_tensor(stored.name)
            return tensor if mapped else tensor.clone()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{stored.file}: cannot be read again ({error}); is something writing to it?"
        ) from None


class _Index(BaseModel):
    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def _weight_files(directory: Path) -> list[Path]:
    # In transformers' order of preference, so that both read the same weights.
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        pickles = sorted(
            path.name for suffix in ("bin", "pt", "pth") for path in directory.glob(f"*.{suffix}")
        )
        there = (
            f"only pickle files ({', '.join(pickles[:3])}), which can run code when opened"
            if pickles
            else "none"
        )
        raise CheckpointError(
            f"{directory}: needs safetensors weights (model.safetensors or its index), found "
            f"{there}; convert pickle weights where you trust them: python -c "
            '"from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('DIR', dtype='auto').save_pretrained('NEW')\" and copy the "
            "tokenizer files."
        )
    try:
        shard_of = _Index.model_validate_json(index.read_bytes()).weight_map
    except (OSError, ValueError):
        raise CheckpointError(
            f"{index}: has no weight_map from tensor names to shard files; copy it again."
        ) from None
    names = sorted(set(shard_of.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(
                f"{index}: shard '{name}' must be a plain file name inside {directory}."
            )
        if not os.path.isfile(
            directory / name
        ):  # unlike Path.is_file, False for a name that no disk takes
            raise CheckpointError(
                f"{directory}: shard {name} named in {index.name} is missing; copy it there."
            )
    return [directory / name for name in names]


def tensors_in(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return every tensor of safetensors files by name, from the headers alone. Raises
    CheckpointError.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # no mapping
                    piece = opened.get_slice(name)
                    dtype, shape = piece.get_dtype(), tuple(piece.get_shape())
                    if dtype not in _DTYPES:
                        allowed = ", ".join(_DTYPES)
                        raise CheckpointError(
                            f"{file}: stores weights as {dtype}, not prunable; allowed: {allowed}."
                        )
                    tensors[name] = StoredTensor(file, name, _DTYPES[dtype], shape)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: is truncated, damaged or not safetensors ({error}); copy it again."
            ) from None
    return tensors


# What each method appends to a weight's name, and what the weight is called without it.
_OF_MODULES = ("packed", "scale", "zero_point", "global_scale", "shape", "scale_2", "g_idx")
_MODULES = {f".weight_{part}": ".weight" for part in _OF_MODULES}
_GEMM = {f".{part}": ".weight" for part in ("qweight", "qzeros", "scales", "g_idx")}
_FP8 = {"_scale_inv": "", ".scale": ".weight", ".qscale_weight": ".weight"}
_WHOLE = (".weight_packed", ".qweight", "_blocks")
# Of activations and caches, which stay in bfloat16.
_OF_ACTIVATIONS = re.compile(r".*[._](input|output|activation|[kqv])_(global_)?(scale|zero_point)")
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]

Parts = dict[str, Tensor]
# What a config says of how its weights are quantised.
Settings = dict[str, Any]


class Deferred:
    """A tensor that is made anew whenever it is sliced, as transformers' loader slices those of a
    file.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make

    def __getitem__(self, index: Any) -> Tensor:
        return self.make()[index]


def take_quantisation(config: Any, where: str) -> Settings | None:
    """Remove `quantization_config` from a model's config, make its dtype bfloat16, and return its
    settings.

    Raises CheckpointError for a method that cannot be read, or whose package is missing.
    """
    configs = (config, config.get_text_config())
    taken = [
        vars(config).pop("quantization_config")
        for config in configs
        if "quantization_config" in vars(config)
    ]
    if not taken:
        return None
    settings = taken[0]
    for holder in configs:
        holder.dtype = torch.bfloat16
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method == "bitsandbytes":
        raise CheckpointError(
            f"{where}: its weights are quantised by bitsandbytes; where that is installed, make "
            'bfloat16 of them: python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('DIR').dequantize().save_pretrained('NEW')\" and copy the tokenizer "
            "files."
        )
    reason = "" if method in QUANTISATIONS else f"the method {method or 'that it does not name'}"
    if method == "compressed-tensors" and settings.get("transform_config"):
        reason = "rotations (transform_config)"
    elif method == "awq" and settings.get("version", "gemm").lower() != "gemm":
        reason = f"AWQ's version {settings['version']}"
    elif method in ("gptq", "awq") and settings.get("bits") not in (2, 4, 8):
        reason = f"{method.upper()} with {settings.get('bits')} bits"
    if reason:
        raise CheckpointError(
            f"{where}: its weights are quantised, and {reason} cannot be read; known are "
            f"{', '.join(QUANTISATIONS)}. Use the original checkpoint, or one in bf16, and "
            "quantise the result."
        )
    if (
        method in ("compressed-tensors", "modelopt")
        and importlib.util.find_spec("compressed_tensors") is None
    ):
        raise CheckpointError(
            f"{where}: reading {method} weights needs a package; run: pip install "
            '"secateur[quantized]"'
        )
    return settings


def note_on(settings: Settings) -> str:
    """Return what people should know of a model whose weights were quantised."""
    detail = (
        settings.get("format")
        or settings.get("quant_algo")
        or (f"{settings['bits']} bits" if "bits" in settings else "")
    )
    form = f"{settings['quant_method']} {detail}".strip()
    return (
        f"The weights were quantised ({form}), and were made bfloat16 while they were read; so a "
        "result is in bfloat16. To quantise it again, use llm-compressor for vLLM, or secateur "
        "export with --type q4_k_m."
    )


def deferred_tensors(
    directory: Path, settings: Settings | None, *, mapped: bool
) -> dict[str, Deferred]:
    """Return the model's tensors by name; each is read, and dequantised to bfloat16, when it is
    sliced.

    `mapped`: those that are not quantised stay in their files.

    Raises CheckpointError for weights without scales; slicing, for parts that do not fit each
    other.
    """
    suffixes, compute = QUANTISATIONS[settings["quant_method"]] if settings else ({}, None)
    stored = stored_tensors(directory)
    weights: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in stored.items():
        if settings and _OF_ACTIVATIONS.fullmatch(name):
            continue
        owner, part = _owner(name, suffixes, stored)
        weights[owner][part] = tensor
    tensors: dict[str, Deferred] = {}
    for name, parts in weights.items():
        if parts.keys() != {"weight"}:
            tensors[name] = Deferred(partial(_computed, compute, name, parts, settings or {}))
            continue
        dtype = parts["weight"].dtype
        if settings and dtype.itemsize == 1 and dtype is not torch.bool:
            raise CheckpointError(
                f"{directory}: {name} is quantised and has no scale; copy the checkpoint again."
            )
        tensors[name] = Deferred(partial(read_tensor, parts["weight"], mapped=mapped))
    return tensors


def _owner(name: str, suffixes: dict[str, str], stored: Collection[str]) -> tuple[str, str]:
    """Return the weight that the stored tensor is part of, and as what; a tensor may only be named
    like a part.
    """
    for suffix, end in suffixes.items():
        base = name.removesuffix(suffix)
        if base != name and any(base + whole in stored for whole in (end, *_WHOLE)):
            return base + end, suffix.lstrip("._")
    return name, "weight"


def _computed(
    compute: Any, name: str, parts: dict[str, StoredTensor], settings: Settings
) -> Tensor:
    """Return the weight that the parts make."""
    try:
        return compute(
            name, {part: read_tensor(tensor) for part, tensor in parts.items()}, settings
        ).to(torch.bfloat16)
    except BAD_VALUE as error:
        raise CheckpointError(
            f"weight {name}: cannot be dequantised ({one_line(error)})."
        ) from None


def _fp8(name: str, parts: Parts, settings: Settings) -> Tensor:
    """Return weight * scale, one scale to each block; the last block of a row or column may be
    smaller.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = parts.pop("weight")
    (scale,) = parts.values()
    if weight.dtype.is_floating_point and scale.ndim == weight.ndim:
        for axis, block in zip((-2, -1), settings.get("weight_block_size") or (1, 1), strict=True):
            size = weight.shape[axis]
            # transformers takes the size of blocks from the number of scales, which is wrong if the
            # last is smaller: then each number gets a scale of its own.
            if size % block and scale.shape[axis] == -(-size // block):
                scale = scale.repeat_interleave(block, axis).narrow(axis, 0, size)
    given: dict[str, Tensor | list[Tensor]] = {"weight": weight, "weight_scale_inv": scale}
    return cast(Tensor, Fp8Dequantize(None).convert(given)["weight"])


def _mxfp4(name: str, parts: Parts, settings: Settings) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(parts["blocks"], parts["scales"], dtype=torch.bfloat16)


def _compressed(name: str, parts: Parts, settings: Settings) -> Tensor:
    """Return the weight by the scheme whose targets name its module, else by that of all
    linears.
    """
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    config = QuantizationConfig.model_validate(settings)
    module = name.removesuffix(".weight")
    schemes: list[Any] = list(config.config_groups.values())
    named = [
        scheme for scheme in schemes if any(match_name(module, target) for target in scheme.targets)
    ]
    general = [
        scheme
        for scheme in schemes
        if not any(target.startswith("re:") for target in scheme.targets)
    ]
    (scheme,) = (named or general)[:1]
    return _decompressed(parts, scheme, scheme.format or config.format)


def _decompressed(parts: Parts, scheme: Any, form: str) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format

    if form in ("mixed-precision", "dense"):
        form = infer_module_format(nn.Linear, scheme).value
    compressor: Any = BaseCompressor.get_value_from_registry(form)
    return compressor.decompress(parts, scheme)["weight"]


def _modelopt(name: str, parts: Parts, settings: Settings) -> Tensor:
    """Return an NVFP4 or FP8 weight; modelopt's second scale divides where compressed-tensors'
    multiplies.
    """
    from compressed_tensors.quantization import preset_name_to_scheme

    if "weight_scale_2" not in parts:
        return _decompressed(parts, preset_name_to_scheme("FP8", ["Linear"]), "float-quantized")
    packed = {
        "weight_packed": parts["weight"],
        "weight_scale": parts["weight_scale"],
        "weight_global_scale": 1 / parts["weight_scale_2"],
    }
    return _decompressed(packed, preset_name_to_scheme("NVFP4", ["Linear"]), "nvfp4-pack-quantized")


def _gptq(name: str, parts: Parts, settings: Settings) -> Tensor:
    """Return w_oi = s_og (q_oi - z_og), g the group of input i. Integers are packed along inputs,
    zeros along outputs.

    The first version of the format stores z - 1. Source: Frantar et al., arXiv 2210.17323; files of
    AutoGPTQ.
    """
    zeros_GO = _unpacked(parts["qzeros"], settings["bits"]) + (
        settings.get("checkpoint_format") != "gptq_v2"
    )
    return _affine(_unpacked(parts["qweight"].T, settings["bits"]).T, zeros_GO, parts)


def _awq(name: str, parts: Parts, settings: Settings) -> Tensor:
    """Return w_oi = s_og (q_oi - z_og). Integers are packed along outputs, eight in an order of
    their own.

    Source: Lin et al., arXiv 2306.00978; the format GEMM of AutoAWQ.
    """
    zeros_GO = (
        _in_order(parts["qzeros"]) if "qzeros" in parts else torch.full_like(parts["scales"], 8)
    )
    return _affine(_in_order(parts["qweight"]), zeros_GO, parts)


def _affine(quantised_IO: Tensor, zeros_GO: Tensor, parts: Parts) -> Tensor:
    scales_GO, inputs = parts["scales"], torch.arange(len(quantised_IO))
    group_I = (
        parts["g_idx"].long() if "g_idx" in parts else inputs // (len(inputs) // len(scales_GO))
    )
    return (
        (quantised_IO - zeros_GO[group_I]).to(scales_GO.dtype) * scales_GO[group_I]
    ).T.contiguous()


def _in_order(packed: Tensor) -> Tensor:
    return _unpacked(packed, 4).unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Return the integers of `bits` bits that 32-bit ones hold along the last axis, lowest bits
    first.
    """
    return (
        packed.unsqueeze(-1) >> torch.arange(0, 32, bits, dtype=torch.int32) & 2**bits - 1
    ).flatten(-2)


QUANTISATIONS: dict[str, tuple[dict[str, str], Callable[[str, Parts, Settings], Tensor]]] = {
    "fp8": (_FP8, _fp8),
    "mxfp8": (_FP8, _fp8),
    "mxfp4": ({"_blocks": "", "_scales": ""}, _mxfp4),
    "compressed-tensors": (_MODULES, _compressed),
    "modelopt": (_MODULES, _modelopt),
    "gptq": (_GEMM, _gptq),
    "awq": (_GEMM, _awq),
}
