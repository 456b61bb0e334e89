"""A model handed over in memory: made ready for a run that ends in a checkpoint.

In: a model as the user holds it. Out: the same model, computing what its checkpoint will compute when it is loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import CheckpointError
from secateur.modeling_per_layer import PerLayerModel


def check_in_memory(model: object, tokenizer: object) -> None:
    """Raise CheckpointError if this is no model that can be pruned in memory, or its tokenizer is missing."""
    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(f"model: must be a transformers PreTrainedModel or a path, got {type(model).__name__}.")
    if model.config.is_heterogeneous and not isinstance(model, PerLayerModel):
        raise CheckpointError(
            "model: its widths differ per layer and it runs code of its checkpoint; load it with secateur.load(path), "
            "or give its path."
        )
    if tokenizer is None:
        raise CheckpointError("tokenizer: a model in memory comes without one; pass tokenizer=.")
    if getattr(model.config, "quantization_config", None):
        raise CheckpointError(
            "model: it was loaded from quantised weights (config.quantization_config); give the path of its original "
            "checkpoint or .gguf file instead of the loaded model."
        )


def restore_buffers(model: nn.Module) -> tuple[str, ...]:
    """Recompute buffers that no checkpoint stores where they differ from what loading computes; say so, one note each.

    `model.to(torch.bfloat16)` rounds the rotary frequencies, while a model loaded in bfloat16 has them in float32. What
    is measured must be what the saved checkpoint gives, so the model in memory moves to the checkpoint's numbers.
    Looked at are modules of buffers alone, which are made from the config alone.
    """
    notes = []
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if not module._non_persistent_buffers_set or config is None or any(True for _ in module.parameters()):
            continue
        loaded = type(module)(config)
        for buffer in sorted(module._non_persistent_buffers_set):
            ours, theirs = module.get_buffer(buffer), loaded.get_buffer(buffer)
            if ours.dtype != theirs.dtype or not torch.equal(ours.cpu(), theirs):
                setattr(module, buffer, theirs.to(ours.device))
                notes.append(
                    f"{name}.{buffer} differed from what loading the checkpoint computes, as after "
                    ".to(torch.bfloat16), so it was computed anew."
                )
    return tuple(notes)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off inside the block; every module is in its old mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
