"""`secateur export`: a checkpoint in, a GGUF file out, complete or not at all."""

import logging
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from secateur.errors import CheckpointError, RecipeError, advice
from secateur.facts import Record
from secateur.files import check_file, staged_file
from secateur.formats.gguf_tensors import (
    OWN_TYPES,
    QUANTISED,
    TYPES,
    GgufSpec,
    gguf_array,
    gguf_family,
    gguf_family_of,
    gguf_tensors,
    num_experts,
    num_gguf_bytes,
    planned_tensors,
    quantise,
    rotary,
    widths_by_layer,
)
from secateur.formats.gguf_tokenizer import add_tokenizer, check_tokenizer
from secateur.formats.save import GgufCheck, check_gguf, have_llama_cpp, require_llama_cpp
from secateur.log import Progress, silent, steps
from secateur.model.checkpoint import (
    Checkpoint,
    check_weights,
    load_tokenizer,
    meta_model,
    open_checkpoint,
)
from secateur.model.config import require_gguf
from secateur.model.stock import Tokenizer, head_width
from secateur.plugins import EXPORTER_GROUP, look_up


def context_length(config: Any, family: GgufSpec) -> int:
    """Return up to how many tokens llama.cpp computes what the model does.

    Where llama.cpp has no sliding window, this is the window's length.
    """
    longest = config.max_position_embeddings
    window = None if family.window_period else getattr(config, "sliding_window", None)
    return min(longest, window or longest)


def add_metadata(writer: Any, config: Any, family: GgufSpec) -> None:
    """Write the keys that describe the model's shape to a `gguf.GGUFWriter`."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config, family))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    num_heads, num_kv_heads, ffn_widths = widths_by_layer(config)
    writer.add_feed_forward_length(_one_or_all(ffn_widths))
    writer.add_head_count(_one_or_all(num_heads))
    if family.latent_attention:
        _add_latent_attention(writer, config)
    else:
        writer.add_head_count_kv(_one_or_all(num_kv_heads))
        # Stated: the default, hidden size / heads, is wrong once heads are pruned.
        writer.add_key_length(head_width(config))
        writer.add_value_length(head_width(config))
    writer.add_rope_dimension_count(
        int(head_width(config) * rotary(config).get("partial_rotary_factor", 1.0))
    )
    add_eps = (
        writer.add_layer_norm_rms_eps if family.eps == "rms_norm_eps" else writer.add_layer_norm_eps
    )
    add_eps(getattr(config, family.eps) if isinstance(family.eps, str) else family.eps)
    for key, name in family.scales.items():
        if (value := getattr(config, key)) is not None:
            getattr(writer, f"add_{name}")(value)
    if family.window_period:
        writer.add_sliding_window(config.sliding_window)
    _add_experts(writer, config)
    _add_rotary(writer, rotary(config), family)


def _one_or_all(values: list[int]) -> int | list[int]:
    return values if len(set(values)) > 1 else values[0]


def _add_latent_attention(writer: Any, sizes: Any) -> None:
    """Write the sizes of latent attention: one KV head a layer, of latent and rotated channels."""
    writer.add_head_count_kv(1)
    writer.add_key_length(sizes.kv_lora_rank + sizes.qk_rope_head_dim)
    writer.add_value_length(sizes.kv_lora_rank)
    writer.add_key_length_mla(sizes.qk_nope_head_dim + sizes.qk_rope_head_dim)
    writer.add_value_length_mla(sizes.v_head_dim)
    writer.add_kv_lora_rank(sizes.kv_lora_rank)
    writer.add_q_lora_rank(sizes.q_lora_rank or 0)


def _add_experts(writer: Any, sizes: Any) -> None:
    import gguf

    count = num_experts(sizes)
    if count is None:
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(sizes.num_experts_per_tok)
    writer.add_expert_feed_forward_length(
        getattr(sizes, "moe_intermediate_size", None) or sizes.intermediate_size
    )
    if (width := getattr(sizes, "shared_expert_intermediate_size", None)) is not None:
        writer.add_expert_shared_feed_forward_length(width)
    if (num_shared := getattr(sizes, "n_shared_experts", None)) is not None:
        writer.add_expert_shared_count(num_shared)
        writer.add_leading_dense_block_count(sizes.first_k_dense_replace)
        writer.add_expert_weights_scale(sizes.routed_scaling_factor)
        writer.add_expert_weights_norm(sizes.norm_topk_prob)
        kinds = gguf.ExpertGatingFuncType
        writer.add_expert_gating_func(
            kinds.SOFTMAX if sizes.model_type == "deepseek_v2" else kinds.SIGMOID
        )
        if (getattr(sizes, "n_group", None) or 1) > 1:
            writer.add_expert_group_count(sizes.n_group)
            writer.add_expert_group_used_count(sizes.topk_group)


def _add_rotary(writer: Any, settings: dict[str, Any], family: GgufSpec) -> None:
    import gguf

    writer.add_rope_freq_base(settings["rope_theta"])
    kind = settings["rope_type"]
    if kind not in ("linear", "yarn"):  # llama3 is a tensor of its own
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(settings["factor"])
    if kind == "linear":
        return
    writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
    if settings.get("mscale_all_dim"):
        # A tenth for DeepSeek alone: llama.cpp's converter, TAG_DEEPSEEK2_YARN_LOG_MUL_FIX.
        factor = 0.1 if family.latent_attention else 1.0
        writer.add_rope_scaling_yarn_log_mul(factor * settings["mscale_all_dim"])
    if settings.get("llama_4_scaling_beta"):
        writer.add_attn_temperature_scale(settings["llama_4_scaling_beta"])
    for key, name in (
        ("attention_factor", "attn_factor"),
        ("beta_fast", "beta_fast"),
        ("beta_slow", "beta_slow"),
    ):
        if settings.get(key) is not None:
            getattr(writer, f"add_rope_scaling_yarn_{name}")(settings[key])


def check_exportable(checkpoint: Checkpoint, type_name: str | None) -> str:
    """Return the type to write, by default the weights' own, after all checks that read no weights.

    Raises RecipeError for an unknown type, ArchError for a family or structure that llama.cpp does
    not run, CheckpointError for a missing package, a source that is GGUF already, or a tokenizer
    that cannot be written.
    """
    if type_name is not None and type_name not in (allowed := (*TYPES, *QUANTISED)):
        raise RecipeError(
            f"export type: unknown type '{type_name}'; allowed: {', '.join(allowed)}; "
            f"{advice(type_name, allowed)}"
        )
    if type_name in QUANTISED:
        require_llama_cpp(f"export --type {type_name}")
    require_gguf("GGUF export")
    if checkpoint.gguf_file:
        raise CheckpointError(
            f"{checkpoint.reference}: is GGUF already; give a directory with safetensors weights."
        )
    if checkpoint.quantised:
        raise CheckpointError(
            f"{checkpoint.reference}: its weights are quantised; give a result of pruning it, or "
            'write it in bfloat16 first: python -c "import secateur; '
            "secateur.load('DIR').save_pretrained('NEW')\" and copy the tokenizer."
        )
    family = gguf_family(checkpoint)
    check_weights(checkpoint, meta_model(checkpoint.config))
    vocab_size = checkpoint.config.get_text_config().vocab_size
    check_tokenizer(load_tokenizer(checkpoint), vocab_size, checkpoint.reference)
    own = OWN_TYPES.get(str(checkpoint.config.dtype))
    if own is None and type_name not in TYPES:
        raise RecipeError(
            f"export type: the weights are {checkpoint.config.dtype}, which has no counterpart; "
            f"choose one of {', '.join(TYPES)}."
        )
    gguf_tensors(checkpoint, family, type_name if type_name in TYPES else str(own))
    return type_name or str(own)


def export_gguf(
    checkpoint: Checkpoint,
    file: Path,
    type_name: str,
    progress: Progress = silent,
) -> None:
    """Write the model, its tokenizer and chat template to `file`.

    Types of `QUANTISED` are made by llama.cpp from a file beside it in the weights' own type, which
    is gone afterwards. Raises as `check_exportable`, and NumericsError for a weight that the type
    cannot hold.
    """
    if type_name in QUANTISED:
        with tempfile.TemporaryDirectory(prefix=f"{file.name}-", dir=file.parent) as scratch:
            whole = Path(scratch) / "whole.gguf"
            export_gguf(checkpoint, whole, OWN_TYPES[str(checkpoint.config.dtype)], progress)
            progress("quantise", 0, 1)
            quantise(whole, file, type_name, checkpoint.reference)
            progress("quantise", 1, 1)
        return
    import gguf

    family = gguf_family(checkpoint)
    tensors = gguf_tensors(checkpoint, family, type_name)
    with closing(
        _begun(checkpoint.config, load_tokenizer(checkpoint), checkpoint.reference, type_name)
    ) as writer:
        for tensor in tensors:
            # raw_dtype decides, but uint8 before it would convert the shape.
            kind = gguf.GGMLQuantizationType[tensor.type_name.upper()]
            shape, dtype, num_bytes = tensor.shape, np.dtype(np.float32), num_gguf_bytes(tensor)
            writer.add_tensor_info(tensor.gguf_name, shape, dtype, num_bytes, raw_dtype=kind)
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in steps(progress, "export", tensors):
            writer.write_tensor_data(gguf_array(tensor, family, checkpoint.config))


def gguf_bytes(model: Any, type_name: str, reference: str) -> int:
    """Return the bytes of a file of `model`, which may be on meta, without its tokenizer and other
    words.

    Raises ArchError for what llama.cpp does not run, CheckpointError if the package gguf is
    missing.
    """
    require_gguf("the size of a GGUF file")
    import gguf

    sizes = map(
        num_gguf_bytes, planned_tensors(model, gguf_family_of(model.config, reference), type_name)
    )
    return sum(gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT) for size in sizes)


def _begun(config: PreTrainedConfig, tokenizer: Tokenizer, reference: str, type_name: str) -> Any:
    """Return a writer that has all but the tensors."""
    import gguf

    family = gguf_family_of(config, reference)
    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)
    writer = gguf.GGUFWriter(None, family.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(reference).name)
    file_type = "ALL_F32" if type_name == "f32" else f"MOSTLY_{type_name.upper()}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_metadata(writer, config, family)
    add_tokenizer(writer, tokenizer, config.get_text_config().vocab_size, reference)
    return writer


@dataclass(frozen=True, slots=True)
class Exporter:
    """One format.

    check(checkpoint, type name or None): returns the number type to write, by default the weights'
    own. It reads no weights and raises a SecateurError for what cannot be written.
    write(checkpoint, path, type name, progress): writes the file, under a hidden name at first.
    """

    check: Callable[[Checkpoint, str | None], str]
    write: Callable[[Checkpoint, Path, str, Progress], Any]


EXPORTERS = {"gguf": Exporter(check_exportable, export_gguf)}


@dataclass(frozen=True, slots=True)
class Export(Record):
    """The written file. `context_length`: up to how many tokens it is right, None if unknown.

    `check`: None if it was not run.
    """

    file: str
    type_name: str
    num_bytes: int
    context_length: int | None
    check: GgufCheck | None


def export(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "gguf",
    type_name: str | None = None,
    check: bool | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Export:
    """Write a model with tokenizer and chat template as one file, complete or not at all.

    `model`: a local directory, a hub id or `smollm2-135m`. `out`: the file to write.
    `format`: one of `EXPORTERS`, or one that an installed package registers.
    `type_name`: f32, f16, bf16, q8_0, or one of llama.cpp's quantiser such as q4_k_m (the option
    --type), by default the weights' own.
    `check`: whether llama.cpp must agree with transformers before a GGUF file appears; None: if it
    is installed.
    `overwrite`: replace the file if it exists. `progress`: called with (stage, done, total).

    Returns an `Export`: the file, its type and bytes, and what the check found.

    Raises a SecateurError, one sentence, for everything that a user can correct: CheckpointError
    for a model that llama.cpp cannot run, RecipeError for options.
    """
    # Check all that was asked before a weight is read.
    file = Path(out)
    exporter = look_up(EXPORTER_GROUP, format, EXPORTERS, Exporter)
    is_gguf = format == "gguf"
    if check and not is_gguf:
        raise RecipeError(
            f"export --check: format {format} has nothing that checks it; leave --check out."
        )
    if check:
        require_llama_cpp("export --check")
    check_file(file, overwrite=overwrite)
    checkpoint = open_checkpoint(model)
    _check_old_file(file, checkpoint, is_gguf=is_gguf)
    type_name = exporter.check(checkpoint, type_name)

    # Write the file; it appears once llama.cpp agrees.
    with staged_file(file, overwrite=overwrite) as staged:
        exporter.write(checkpoint, staged, type_name, progress)
        num_bytes, compared = staged.stat().st_size, None
        if is_gguf and check is not False and have_llama_cpp():
            progress("check", 0, 1)
            compared = check_gguf(staged, checkpoint, type_name)
            progress("check", 1, 1)
    length = context_length(checkpoint.config, gguf_family(checkpoint)) if is_gguf else None
    return Export(str(file), type_name, num_bytes, length, compared)


def _check_old_file(file: Path, checkpoint: Checkpoint, *, is_gguf: bool) -> None:
    """Raise CheckpointError if `file` is there and is no earlier export, or is the model that is
    read.
    """
    if not file.exists():
        return
    if checkpoint.gguf_file and file.samefile(checkpoint.directory / checkpoint.gguf_file):
        raise CheckpointError(f"{file}: is the model that is being exported; choose another name.")
    with file.open("rb") as old:
        if is_gguf and old.read(4) != b"GGUF":
            raise CheckpointError(
                f"{file}: is no GGUF file, so --overwrite does not replace it; choose another name."
            )
