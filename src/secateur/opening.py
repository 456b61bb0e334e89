"""What a run is given, opened, looked at and loaded; and what is decided of memory before that.

In: a reference or a model in memory, the recipe. Out: the model's shape and architecture, the device, how weights keep
within memory, and the model itself. Everything that is wrong with these is said before a weight is read.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.arch import Arch, bind
from secateur.checkpoint import Checkpoint, check_finite, check_weights, load_model, meta_model, open_checkpoint
from secateur.checkpoint_tokenizer import load_tokenizer
from secateur.device import device_called, free_bytes
from secateur.errors import RecipeError
from secateur.estimate import MemoryPlan, plan_device_memory, plan_memory
from secateur.in_memory import check_in_memory, restore_buffers
from secateur.output import parse_size
from secateur.recipe import Recipe
from secateur.resolve import Resolved
from secateur.resolve_hidden import check_for
from secateur.summary import Size


def opened(
    model: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe
) -> tuple[Checkpoint | None, PreTrainedModel, Arch]:
    """Return the checkpoint, None of a model in memory, and the model, that of a checkpoint without its weights.

    Raises a SecateurError if the recipe does not fit the model, or files do not fit their config.
    """
    parse_size("max_shard_size", recipe.max_shard_size)
    if isinstance(model, str | Path):
        checkpoint = open_checkpoint(model)
        model = meta_model(checkpoint.config)
    else:
        check_in_memory(model, tokenizer)
        checkpoint = None
    arch = bind(model)
    check_for(recipe, model)
    if checkpoint is not None:
        check_weights(checkpoint, model)
    return checkpoint, model, arch


def device_for(recipe: Recipe, checkpoint: Checkpoint | None, model: PreTrainedModel) -> torch.device:
    """Return where the run computes; a model in memory stays where it is. Raises RecipeError if there is no such."""
    if checkpoint is not None:
        return device_called(recipe.device)
    if recipe.device_budget is not None:
        raise RecipeError("device_budget: a model in memory is where it is; give its path, or leave device_budget out.")
    if recipe.device is not None and device_called(recipe.device).type != model.device.type:
        raise RecipeError(
            f"device: is {recipe.device}, and the model in memory is on {model.device}; move the model, or leave "
            f"device out."
        )
    return model.device


def memory_for(
    resolved: Resolved, arch: Arch, model: PreTrainedModel, checkpoint: Checkpoint | None, device: torch.device
) -> MemoryPlan:
    """Return how the run keeps within the memory that there is, or that its recipe allows.

    `model`: its shape will do. Raises RecipeError, naming the least that can work, if nothing helps.
    """
    can_map = checkpoint is not None and checkpoint.gguf_file is None
    if device.type == "cpu":
        return plan_memory(resolved, arch, model.config, Size.of(model), can_map=can_map)
    free = None if checkpoint is None else free_bytes(device)
    return plan_device_memory(resolved, arch, model.config, Size.of(model), free, can_map=can_map)


def tokenizer_of(checkpoint: Checkpoint | None) -> PreTrainedTokenizerBase:
    """Return the checkpoint's tokenizer; there is a checkpoint wherever none was handed over."""
    assert checkpoint is not None
    return load_tokenizer(checkpoint)


def loaded(
    checkpoint: Checkpoint | None, model: PreTrainedModel, plan: MemoryPlan, device: torch.device
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the model with its weights, in ordinary memory or mapped, and what was changed of one in memory."""
    if checkpoint is not None:
        # On the way to a device weights need not pass through memory.
        wanted = plan.weights_on_disk or device.type != "cpu"
        return load_model(checkpoint, mapped=wanted and checkpoint.gguf_file is None), ()
    check_finite(model)
    return model, restore_buffers(model)
