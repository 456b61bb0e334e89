"""Stock transformers: the types that secateur names, calls without logs, what it raises for
unusable values.
"""

import logging
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import are_progress_bars_disabled
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from secateur.errors import CheckpointError, one_line

# For modules that need nothing else from transformers.
CausalLM = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase

# What transformers raises for unusable values, and gguf for a truncated or corrupt file.
BAD_VALUE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    OSError,
    RuntimeError,
    StrictDataclassError,
)
BAD_GGUF = (*BAD_VALUE, struct.error)


@contextmanager
def refused(sentence: str, bad: tuple[type[Exception], ...] = BAD_VALUE) -> Iterator[None]:
    """Raise CheckpointError, this sentence with the reason behind it, for what is `bad` inside the
    block.
    """
    try:
        yield
    except CheckpointError:
        raise
    except bad as error:
        raise CheckpointError(f"{sentence} ({one_line(error)}).") from None


def layer_config(config: Any, index: int) -> Any:
    """Return the config of a decoder layer; the whole one beyond its count of layers, as BART's is
    the encoder's.
    """
    return config.per_layer_config[index] if index < config.num_hidden_layers else config


def head_width(config: Any) -> int:
    """Return head_dim; it follows from hidden_size if the config does not state it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence logs, progress bars and warnings of transformers and the hub inside the block."""
    verbosity, hub_verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars_were_on = (
        transformers_logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity(logging.CRITICAL)
        hub_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()  # switches the hub's bars too
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            hub_logging.set_verbosity(hub_verbosity)
            if bars_were_on:
                transformers_logging.enable_progress_bar()


@contextmanager
def replaced(names: Mapping[str, Any], name: str, value: Any) -> Iterator[None]:
    """Give a name another value inside the block. `names`: `vars` of a module or an object, or the
    environment.
    """
    is_new, old = name not in names, names.get(name)
    changing: Any = names  # the type of `vars` does not say that a module's names can be changed
    changing[name] = value
    try:
        yield
    finally:
        if is_new:
            del changing[name]
        else:
            changing[name] = old


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode inside the block, and restore its mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
