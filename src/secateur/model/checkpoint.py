"""Reading a checkpoint: from what the user typed to a config, a model in memory and a tokenizer.

Also prepares a model that is handed over in memory.
"""

import functools
import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from secateur.errors import CheckpointError
from secateur.files import read_json, sha256_of
from secateur.model.config import TOKENIZER_FILES, directory_config, gguf_config, locate
from secateur.model.modeling_per_layer import PerLayerModel, is_per_layer, per_layer_class
from secateur.model.modules import linears_for_conv, shapes_of
from secateur.model.stock import (
    BAD_GGUF,
    BAD_VALUE,
    CausalLM,
    quiet_transformers,
    refused,
    replaced,
)
from secateur.model.tensors import (
    StoredTensor,
    deferred_tensors,
    note_on,
    stored_tensors,
    take_quantisation,
)

# Head and embedding are one matrix if the mean cosine of their rows, of about so many, is at least
# this.
ONE_MATRIX, ROWS_TO_COMPARE = 0.99, 1000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that exists and looks loadable; no weight has been read yet."""

    reference: str  # what the user typed
    directory: Path
    gguf_file: str | None  # file name inside `directory`, when the weights are GGUF
    config: PreTrainedConfig
    quantised: dict[str, Any] | None = None  # what the config said of how the weights are quantised


def open_checkpoint(reference: str | Path, *, weights: bool = True) -> Checkpoint:
    """Find the model and check its config and, if `weights`, the headers of its weight files.

    Reads no weights. Downloads a hub id, with `weights=False` only its JSON and tokenizer files.
    Raises CheckpointError if the model cannot be loaded, ArchError if it is no causal LM.
    """
    reference = str(reference)
    directory, gguf_file = locate(reference, weights=weights)
    config = gguf_config(directory / gguf_file) if gguf_file else directory_config(directory)
    quantised = take_quantisation(config, reference)
    if weights and not gguf_file:
        dtypes = {name: tensor.dtype for name, tensor in stored_tensors(directory).items()}
        packed = (name for name in dtypes if name.endswith("weight") and dtypes[name].itemsize == 1)
        if quantised is None and (name := next(packed, None)):
            raise CheckpointError(
                f"{reference}: weight {name} is stored as "
                f"{str(dtypes[name]).removeprefix('torch.')}, so the weights are quantised, and "
                "its config.json has no quantization_config that says how; copy the model's own."
            )
        config.dtype = config.dtype or next(
            (dtype for dtype in dtypes.values() if dtype.is_floating_point), None
        )
    config.name_or_path = ""  # saved files must not contain local paths
    return Checkpoint(reference, directory, gguf_file, config, quantised)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model on the meta device, in the config's dtype. Raises CheckpointError."""
    problem = f"config of a {config.model_type} model: no model can be built from it"
    with refused(problem), quiet_transformers(), torch.device("meta"):
        if is_per_layer(config):
            return per_layer_class(
                MODEL_FOR_CAUSAL_LM_MAPPING[type(config).__bases__[0]]
            )._from_config(config)
        auto = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
        return auto.from_config(config, trust_remote_code=False)


def sees_images(config: PreTrainedConfig) -> bool:
    """Say whether the config is of a whole model with towers; some types have their language model
    as well.
    """
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    return type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or whole in (config.architectures or ())


def planned_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the model on the meta device with its generation config, which names tokens too.

    Raises CheckpointError.
    """
    model, path = meta_model(checkpoint.config), checkpoint.directory / "generation_config.json"
    if path.is_file():
        read_json(path)
        with refused(f"{path}: transformers cannot use it"):
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model


def check_weights(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Compare the tensors in the safetensors headers with those of `model`, which may be on meta.

    Tied weights may be absent. GGUF files, quantised ones, and families whose files name tensors
    differently than the model (fused experts), are compared after loading instead. Raises
    CheckpointError.
    """
    if (
        checkpoint.gguf_file
        or checkpoint.quantised
        or get_model_conversion_mapping(model, add_legacy=False)
    ):
        return
    stored = stored_tensors(checkpoint.directory)
    expected = shapes_of(model)
    ignored = re.compile(
        "|".join([r"rotary_emb\.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ())])
    )
    mismatched = [
        f"{name} is {list(stored[name].shape)}, not {list(shape)} as the config says"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    _refuse(
        checkpoint,
        mismatched=mismatched,
        missing=[
            name
            for name in expected
            if name not in stored and name not in model.all_tied_weights_keys
        ],
        unexpected=[name for name in stored if name not in expected and not ignored.search(name)],
    )


def left_aside(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Return the stored tensors that transformers leaves aside on load, such as MTP heads, in order
    of their names.
    """
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    if checkpoint.gguf_file or not patterns or not any(checkpoint.directory.glob("*.safetensors")):
        return {}
    stored, ignored = stored_tensors(checkpoint.directory), re.compile("|".join(patterns))
    names = sorted(
        name for name in stored if ignored.search(name) and not name.endswith("inv_freq")
    )
    return {name: stored[name] for name in names}


def notes_on(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[str, ...]:
    """Return notes for people on how weights were quantised, and on the tensors that are left aside
    or there twice.
    """
    notes = () if checkpoint.quantised is None else (note_on(checkpoint.quantised),)
    if checkpoint.gguf_file is not None:
        return _notes_on_head(model)
    if not (aside := left_aside(checkpoint, model)):
        return notes
    names, size = list(aside), sum(math.prod(tensor.shape) for tensor in aside.values())
    return (
        *notes,
        f"{len(aside)} tensors of {size:,} parameters ({names[0]} to {names[-1]}) are no part of "
        "the model that transformers runs, such as heads that predict several tokens; a result has "
        "them unchanged if nothing that they read has another shape, else it is without them.",
    )


def _notes_on_head(model: PreTrainedModel) -> tuple[str, ...]:
    """Return a note if the head is the embedding in other digits: llama.cpp may quantise a tied
    matrix twice.
    """
    modules: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding_VD, head_VD = (module.weight for module in modules)
    if head_VD is embedding_VD or head_VD.is_meta:
        return ()
    step = max(1, len(head_VD) // ROWS_TO_COMPARE)
    rows_RD = (weight_VD[::step].detach().float() for weight_VD in (embedding_VD, head_VD))
    cosine = float(cosine_similarity(*rows_RD, dim=-1).mean())
    if cosine < ONE_MATRIX:
        return ()
    num_params = model.num_parameters() - head_VD.numel()
    return (
        "the file has one matrix twice, as embedding and as head (the cosine of their rows is "
        f"{cosine:.3f}), and both count; the checkpoint that it was made of has {num_params:,} "
        "parameters, so prune that one to end below it.",
    )


def load(path: str | Path, **options: Any) -> CausalLM:
    """Return the model in eval mode, ready to run or train; per-layer widths work like any other.

    `path`: a directory, a hub id, a `.gguf` file, or `smollm2-135m`. `options` go to transformers'
    `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, ... The default `dtype` is the
    saved one. Code in a checkpoint never runs.

    Raises CheckpointError if the path or an option is wrong, ArchError for a model that is no
    causal LM.
    """
    if "trust_remote_code" in options:
        raise CheckpointError(
            "load: never runs a checkpoint's own code, so leave trust_remote_code out."
        )
    checkpoint = open_checkpoint(path)
    names = ", ".join(options) or "no options"
    with refused(f"{path}: cannot be loaded with {names}", (*BAD_VALUE, ImportError)):
        return load_model(checkpoint, **options)


def load_model(checkpoint: Checkpoint, *, mapped: bool = False, **options: Any) -> PreTrainedModel:
    """Return the model in eval mode, in the dtype of its config (GGUF and quantised weights:
    bfloat16).

    `mapped`: weights stay in their files and are paged in when used; not if they are quantised.
    `options` go to `from_pretrained`. Raises CheckpointError if a tensor is missing or wrong.
    """
    with quiet_transformers():
        if checkpoint.gguf_file:
            model, info = _load_gguf(checkpoint, options)
        else:
            model, info = _load_safetensors(checkpoint, options, mapped=mapped)
    _refuse(
        checkpoint,
        mismatched=[
            f"{name} is {list(got)}, not {list(expected)}"
            for name, got, expected in info["mismatched_keys"]
        ],
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
    )
    check_finite(model)
    linears_for_conv(model)
    model.config.name_or_path = ""
    return model


def check_finite(model: CausalLM) -> None:
    """Raise CheckpointError naming the first weight that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        # aminmax propagates NaN and infinity, and unlike isfinite() allocates nothing.
        if parameter.numel() > 0 and not all(
            torch.isfinite(extreme) for extreme in parameter.detach().aminmax()
        ):
            raise CheckpointError(
                f"weight {name} of the model holds NaN or infinity; use an intact checkpoint."
            )


def _load_safetensors(
    checkpoint: Checkpoint, options: dict[str, Any], *, mapped: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    skeleton = planned_model(checkpoint)
    check_weights(checkpoint, skeleton)
    weights = deferred_tensors(checkpoint.directory, checkpoint.quantised, mapped=mapped)
    # One after the other: else all are read before the first is in its place.
    with replaced(os.environ, "HF_DEACTIVATE_ASYNC_LOAD", "1"):
        loaded: Any = type(skeleton).from_pretrained(
            None,
            config=checkpoint.config,
            state_dict=weights,
            output_loading_info=True,
            **{"dtype": "auto", **options},
        )
    loaded[0].generation_config = skeleton.generation_config
    return loaded


def _load_gguf(
    checkpoint: Checkpoint, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    import gguf

    # Cached: transformers builds the same name table once per module, half of the loading time.
    # No bar: its GGUF reader draws one, in notebooks too, that ignores its own switch.
    one_table = replaced(
        vars(gguf), "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)
    )
    no_bar = replaced(vars(modeling_gguf_pytorch_utils), "tqdm", lambda items, **_: items)
    with (
        refused(f"{checkpoint.reference}: its GGUF weights cannot be read", BAD_GGUF),
        one_table,
        no_bar,
    ):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            gguf_file=checkpoint.gguf_file,
            config=checkpoint.config,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **{"dtype": torch.bfloat16, **options},
        )
    return loaded


def _refuse(
    checkpoint: Checkpoint, *, mismatched: list[str], missing: list[str], unexpected: list[str]
) -> None:
    for kind, names in (
        ("wrong shape", mismatched),
        ("missing", missing),
        ("unexpected", unexpected),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"{checkpoint.reference}: weights and config disagree, {kind}: {names[0]}{more}; "
                "use the config.json and the weights of the same model."
            )


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Return the tokenizer with its chat template.

    Raises CheckpointError if none exists, or it needs remote code or missing packages.
    """
    directory = checkpoint.directory
    problem = f"{directory}: its tokenizer cannot be loaded"
    # tokenizers raises a bare Exception.
    with refused(problem, (Exception,)), quiet_transformers():
        if checkpoint.gguf_file:
            # AutoTokenizer would parse the whole file again to arrive at this class.
            return PreTrainedTokenizerFast.from_pretrained(
                directory, gguf_file=checkpoint.gguf_file
            )
        _check_tokenizer_files(directory)
        tokenizer = AutoTokenizer.from_pretrained(
            directory, config=checkpoint.config, trust_remote_code=False
        )
        tokenizer("a word", verbose=False)  # some settings are read only now
        check_rows(tokenizer, checkpoint.config.get_text_config().vocab_size, str(directory))
        return tokenizer


def check_rows(tokenizer: PreTrainedTokenizerBase, num_rows: int, where: str) -> None:
    """Raise CheckpointError if the tokenizer gives ids that the embedding has no rows for.

    Added tokens may lie beyond (Gemma 3 has one for images) as long as text is not packed with
    them: the end of a text, and what the chat template writes.
    """
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= num_rows}
    added: dict[str, int] = cast(Any, tokenizer).get_added_vocab() if beyond else {}
    template = str(tokenizer.chat_template)
    wrong = {
        token
        for token in beyond
        if token not in added or token == tokenizer.eos_token or token in template
    }
    if wrong:
        token = min(wrong, key=lambda token: beyond[token])
        raise CheckpointError(
            f"{where}: its tokenizer has {len(tokenizer):,} tokens, the model's embedding "
            f"{num_rows:,} rows, so token '{token}' ({beyond[token]:,}) has none; use the model's "
            "own tokenizer, or resize the embedding."
        )


def _check_tokenizer_files(directory: Path) -> None:
    if not any(any(directory.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise CheckpointError(
            f"{directory}: has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); copy the "
            "model's own there."
        )
    if (directory / "tokenizer.json").is_file():
        read_json(directory / "tokenizer.json")
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    # transformers would read the file that these name, wherever it lies, as the vocabulary.
    named = [key for key in ("vocab", "merges") if isinstance(config.get(key), str)]
    named += ["init_inputs"] if config.get("init_inputs") else []
    if named:
        raise CheckpointError(
            f"{path}: its key '{named[0]}' can name a file outside the directory; remove the key."
        )


SAMPLED_BYTES = 1 << 20
TOKENS_FILE = "tokens.json"  # of `vocabulary.kept`: the dense model's tokens that stayed
_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 over the files that loading the model and its tokenizer reads, and
    `tokens.json`.
    """
    read = (*_MODEL_FILES, *TOKENIZER_FILES, "tokenizer_config.json", TOKENS_FILE)
    patterns = (checkpoint.gguf_file,) if checkpoint.gguf_file else read
    paths = {
        path
        for pattern in patterns
        for path in checkpoint.directory.glob(pattern)
        if path.is_file()
    }
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name}:{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def weight_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Return a hash per weight file: of its size and its first, middle and last megabyte."""
    directory, gguf_file = checkpoint.directory, checkpoint.gguf_file
    files = (
        {directory / gguf_file}
        if gguf_file
        else {each.file for each in stored_tensors(directory).values()}
    )
    return {file.name: _sampled(file) for file in sorted(files)}


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for offset in (0, size // 2, max(0, size - SAMPLED_BYTES)):
            opened.seek(offset)
            digest.update(opened.read(SAMPLED_BYTES))
    return digest.hexdigest()


def check_in_memory(model: object, tokenizer: object, out: object = None) -> None:
    """Raise CheckpointError if the model in memory cannot be pruned, not be loaded from `out`, or
    has no tokenizer.
    """
    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(
            f"model: must be a transformers PreTrainedModel or a path, got {type(model).__name__}."
        )
    if out is not None and model.config.model_type not in CONFIG_MAPPING_NAMES:
        raise CheckpointError(
            f"OUT {out}: nobody could load the result, as transformers itself has no model of type "
            f"'{model.config.model_type}'; leave OUT out, and save the result by your own class."
        )
    if model.config.is_heterogeneous and not isinstance(model, PerLayerModel):
        raise CheckpointError(
            "model: its widths differ per layer and it runs its checkpoint's code; load it with "
            "secateur.load(path), or give its path."
        )
    for name, given in {"model": model, "tokenizer": tokenizer}.items():
        if type(given).__module__.startswith("transformers_modules."):
            raise CheckpointError(
                f"{name}: it runs its checkpoint's code, which no result carries; load it without "
                "trust_remote_code."
            )
    if tokenizer is None:
        raise CheckpointError("tokenizer: a model in memory comes without one; pass tokenizer=.")
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        check_rows(tokenizer, cast(Any, model.get_input_embeddings()).num_embeddings, "tokenizer")
    if getattr(model.config, "quantization_config", None):
        raise CheckpointError(
            "model: it was loaded from quantised weights (config.quantization_config); give the "
            "path of its original checkpoint or .gguf file instead."
        )


def restore_buffers(model: nn.Module) -> tuple[str, ...]:
    """Recompute buffers that no checkpoint stores if they differ from what loading gives.

    `model.to(torch.bfloat16)` rounds the rotary frequencies, while loading in bfloat16 keeps them
    in float32. The model in memory must match its saved checkpoint. Covers modules of buffers only,
    which their config determines. Returns one note per recomputed buffer.
    """
    notes = []
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if (
            not module._non_persistent_buffers_set
            or config is None
            or any(True for _ in module.parameters())
        ):
            continue
        loaded = type(module)(config)
        for buffer in sorted(module._non_persistent_buffers_set):
            ours, theirs = module.get_buffer(buffer), loaded.get_buffer(buffer)
            if ours.dtype != theirs.dtype or not torch.equal(ours.cpu(), theirs):
                setattr(module, buffer, theirs.to(ours.device))
                notes.append(
                    f"{name}.{buffer} differed from what loading the checkpoint computes, as after "
                    ".to(torch.bfloat16), so it was recomputed."
                )
    return tuple(notes)
