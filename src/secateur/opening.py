"""The model of a run, opened: from what the user named to a bound architecture, and to weights when they are asked for.

In: a reference or a model in memory, the recipe. Out: an `Opened`, which later steps take. Its architecture is bound
once, here; `resolve.checked` says whether the recipe fits it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.arch import Arch, bind
from secateur.checkpoint import Checkpoint, check_finite, check_weights, load_model, meta_model, open_checkpoint
from secateur.checkpoint_tokenizer import load_tokenizer
from secateur.device import LOW, device_called, multiplies_in_software
from secateur.errors import RecipeError
from secateur.in_memory import check_in_memory, restore_buffers
from secateur.recipe import Recipe
from secateur.summary import Size


@dataclass(frozen=True, slots=True)
class Opened:
    """A dense model and the recipe for it. `checkpoint`: None for a model in memory.

    `model`: the one in memory, or the checkpoint's, on the meta device until `loaded`. `size`: as it is stored.
    `device`: where the run computes. `tokenizer`: the one that was handed over, if any.
    """

    checkpoint: Checkpoint | None
    model: PreTrainedModel
    arch: Arch
    size: Size
    recipe: Recipe
    device: torch.device
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def name(self) -> str:
        """What the user calls the model."""
        if self.checkpoint is not None:
            return self.checkpoint.reference
        return str(self.model.config._name_or_path or type(self.model).__name__)

    @property
    def directory(self) -> Path | None:
        """The directory of the model's files; None for a model in memory."""
        return None if self.checkpoint is None else self.checkpoint.directory

    def asking(self, recipe: Recipe) -> "Opened":
        """Return the same model with another recipe, not checked yet."""
        return replace(self, recipe=recipe, device=_device_for(recipe, self.checkpoint, self.model))


def open_model(
    model: PreTrainedModel | str | Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    weights: bool = True,
) -> Opened:
    """Return the model with its architecture bound, that of a checkpoint without its weights.

    `weights`: the files of weights must be there, and fit the config.
    Raises a SecateurError if the model cannot be opened, or its family is not known.
    """
    if isinstance(model, str | Path):
        checkpoint = open_checkpoint(model, weights=weights)
        model = meta_model(checkpoint.config)
    else:
        check_in_memory(model, tokenizer)
        checkpoint = None
    arch = bind(model)
    if checkpoint is not None and weights:
        check_weights(checkpoint, model)
    return Opened(checkpoint, model, arch, Size.of(model), recipe, _device_for(recipe, checkpoint, model), tokenizer)


def _device_for(recipe: Recipe, checkpoint: Checkpoint | None, model: PreTrainedModel) -> torch.device:
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


def computes_in_float32(opened: Opened) -> bool:
    """Say whether weights are to be in float32 while they are computed with, and no longer.

    By itself where the device multiplies their dtype in software, and the recipe sets no limit on memory.
    Raises RecipeError if the recipe asks for it where it cannot be.
    """
    recipe, checkpoint, dtype = opened.recipe, opened.checkpoint, opened.model.dtype
    if recipe.compute_dtype == "float32" and (checkpoint is None or recipe.memory_budget is not None):
        why = "memory_budget, which keeps weights in their files" if checkpoint else "a model in memory; convert it"
        raise RecipeError(f"compute_dtype: float32 does not go with {why}; leave one of them out.")
    if checkpoint is None or recipe.memory_budget is not None or dtype not in LOW:
        return False
    return recipe.compute_dtype == "float32" or (
        recipe.compute_dtype is None and multiplies_in_software(opened.device, dtype)
    )


def tokenizer_of(opened: Opened) -> PreTrainedTokenizerBase:
    """Return the tokenizer that was handed over, or the checkpoint's."""
    if opened.tokenizer is not None:
        return opened.tokenizer
    assert opened.checkpoint is not None, "no model in memory is opened without a tokenizer"
    return load_tokenizer(opened.checkpoint)


def loaded(opened: Opened, *, on_disk: bool) -> tuple[Opened, tuple[str, ...]]:
    """Return the model with its weights, in ordinary memory or mapped, and what was changed of one in memory.

    `on_disk`: weights stay in their files.
    """
    model, checkpoint = opened.model, opened.checkpoint
    if checkpoint is None:
        check_finite(model)
        return opened, restore_buffers(model)
    # On the way to a device weights need not pass through memory.
    mapped = (on_disk or opened.device.type != "cpu") and checkpoint.gguf_file is None
    model = load_model(checkpoint, mapped=mapped)
    return replace(opened, model=model, size=Size.of(model)), ()
