"""Writing a checkpoint as a GGUF file, tensor by tensor. In: a checkpoint directory. Out: one file, same in same out.

With the maintained package gguf. Why not a converter from PyPI: transformers reads GGUF but does not write it, gguf
ships no converter, and the packages that repeat llama.cpp's script bring a second `gguf` over the maintained one.
"""

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from secateur.checkpoint import Checkpoint, check_weights, meta_model
from secateur.checkpoint_tokenizer import load_tokenizer
from secateur.errors import CheckpointError, RecipeError, nearest
from secateur.gguf_metadata import add_metadata
from secateur.gguf_rules import gguf_family
from secateur.gguf_tensors import OWN_TYPES, TYPES, GgufTensor, gguf_tensors, num_gguf_bytes, read_gguf_arrays
from secateur.gguf_tokenizer import add_tokenizer, check_tokenizer
from secateur.progress import Progress, silent

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def check_exportable(checkpoint: Checkpoint, type_name: str | None) -> str:
    """Return the type to write, by default the weights' own, after every check that reads no weights.

    Raises RecipeError for an unknown type, ArchError for a family or structure that llama.cpp does not run,
    CheckpointError for a missing package, a source that is GGUF already, or a tokenizer that cannot be written.
    """
    if type_name is not None and type_name not in TYPES:
        raise RecipeError(
            f"export type: unknown type '{type_name}'; allowed: {', '.join(TYPES)}; "
            f"did you mean '{nearest(type_name, TYPES)}'?"
        )
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError('GGUF export needs the gguf package; run: pip install "secateur[gguf]"')
    if checkpoint.gguf_file:
        raise CheckpointError(f"{checkpoint.reference}: is GGUF already; give a directory with safetensors weights.")
    family = gguf_family(checkpoint)
    check_weights(checkpoint, meta_model(checkpoint.config))
    check_tokenizer(load_tokenizer(checkpoint), _vocab_size(checkpoint), checkpoint.reference)
    type_name = type_name or OWN_TYPES.get(str(checkpoint.config.dtype))
    if type_name is None:
        raise RecipeError(
            f"export type: the weights are {checkpoint.config.dtype}, which has no counterpart; "
            f"choose one of {', '.join(TYPES)}."
        )
    gguf_tensors(checkpoint, family, type_name)
    return type_name


def export_gguf(checkpoint: Checkpoint, file: Path, type_name: str, progress: Progress = silent) -> None:
    """Write the model, its tokenizer and chat template to `file`.

    Raises as `check_exportable`, and NumericsError for a weight that the type cannot hold.
    """
    import gguf

    family = gguf_family(checkpoint)
    tensors = gguf_tensors(checkpoint, family, type_name)
    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)
    writer = gguf.GGUFWriter(None, family.architecture)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(checkpoint.reference).name)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[type_name]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_metadata(writer, checkpoint.config, family)
        add_tokenizer(writer, load_tokenizer(checkpoint), _vocab_size(checkpoint), checkpoint.reference)
        _write(writer, file, tensors, read_gguf_arrays(tensors, family, checkpoint.config), progress)
    finally:
        writer.close()


def _vocab_size(checkpoint: Checkpoint) -> int:
    return checkpoint.config.get_text_config().vocab_size


def _write(
    writer: Any, file: Path, tensors: list[GgufTensor], arrays: Iterator[np.ndarray], progress: Progress
) -> None:
    import gguf

    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[TYPES[tensor.type_name]]
        # The dtype given does not matter where the type is; only that it is not bytes, whose shape would be converted.
        writer.add_tensor_info(
            tensor.gguf_name, tensor.shape, np.dtype(np.float32), num_gguf_bytes(tensor), raw_dtype=kind
        )
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, array in enumerate(arrays):
        progress("export", done, len(tensors))
        writer.write_tensor_data(array)
    progress("export", len(tensors), len(tensors))
