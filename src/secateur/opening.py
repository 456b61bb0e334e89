"""What a run is given, opened, looked at and loaded; and what is decided of memory before that.

In: a reference or a model in memory, the recipe. Out: the model's shape and architecture, the device, how weights keep
within memory, the model itself, and the store of finished steps. Everything that is wrong with these is said before a
weight is read.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.arch import Arch, bind, decoder_layers
from secateur.checkpoint import Checkpoint, check_finite, check_weights, load_model, meta_model, open_checkpoint
from secateur.checkpoint_tokenizer import load_tokenizer
from secateur.device import CPU, LOW, device_called, free_bytes, multiplies_in_software
from secateur.errors import CheckpointError, RecipeError
from secateur.estimate import MemoryPlan, plan_device_memory, plan_memory
from secateur.fingerprint import weight_digests
from secateur.in_memory import check_in_memory, restore_buffers
from secateur.layers_on_device import Placement
from secateur.output import parse_size
from secateur.ranks import is_first
from secateur.recipe import Recipe
from secateur.resolve import Resolved, check_without_prices, recipe_prices, resolve
from secateur.runlog import RunLog
from secateur.store import Store
from secateur.summary import Size, versions

# Whatever of these a run has: the bytes of its result are the same.
_WITHOUT_EFFECT = {"memory_budget", "device_budget"}


@dataclass(slots=True)
class Given:
    """`checkpoint`: None of a model in memory. `shape`: that model, or the checkpoint's, first without weights."""

    checkpoint: Checkpoint | None
    shape: PreTrainedModel
    arch: Arch
    device: torch.device


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
    check_for(recipe, arch, model)
    if checkpoint is not None:
        check_weights(checkpoint, model)
    return checkpoint, model, arch


def check_for(recipe: Recipe, arch: Arch, model: PreTrainedModel) -> None:
    """Raise ArchError or RecipeError for what this model cannot do, whatever its units cost."""
    check_without_prices(recipe, arch, model.config)


def resolve_for(recipe: Recipe, model: PreTrainedModel) -> Resolved:
    """Return the recipe in concrete numbers for the dense model, whose shape will do. Raises as `resolve`."""
    arch = bind(model)
    check_for(recipe, arch, model)
    return resolve(recipe, arch, model.config, recipe_prices(recipe, arch, model))


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


def computes_in_float32(
    recipe: Recipe, checkpoint: Checkpoint | None, model: PreTrainedModel, device: torch.device
) -> bool:
    """Say whether weights are to be in float32 while they are computed with, and no longer.

    By itself where the device multiplies their dtype in software, and the recipe sets no limit on memory.
    Raises RecipeError if the recipe asks for it where it cannot be.
    """
    if recipe.compute_dtype == "float32" and (checkpoint is None or recipe.memory_budget is not None):
        why = "memory_budget, which keeps weights in their files" if checkpoint else "a model in memory; convert it"
        raise RecipeError(f"compute_dtype: float32 does not go with {why}; leave one of them out.")
    if checkpoint is None or recipe.memory_budget is not None or model.dtype not in LOW:
        return False
    return recipe.compute_dtype == "float32" or (
        recipe.compute_dtype is None and multiplies_in_software(device, model.dtype)
    )


def memory_for(
    resolved: Resolved, arch: Arch, model: PreTrainedModel, checkpoint: Checkpoint | None, device: torch.device
) -> MemoryPlan:
    """Return how the run keeps within the memory that there is, or that its recipe allows.

    `model`: its shape will do. Raises RecipeError, naming the least that can work, if nothing helps.
    """
    facts, can_map = (resolved, arch, model.config), checkpoint is not None and checkpoint.gguf_file is None
    in_float32 = computes_in_float32(resolved.recipe, checkpoint, model, device)
    if device.type == "cpu":
        return plan_memory(*facts, Size.of(model), can_map=can_map, in_float32=in_float32)
    free = None if checkpoint is None else free_bytes(device)
    return plan_device_memory(*facts, Size.of(model), free, can_map=can_map, in_float32=in_float32)


def placement_of(model: PreTrainedModel, given: Given, plan: MemoryPlan) -> Placement:
    """Return the loaded model's way to the device; a model in memory stays where it is."""
    layers, to = decoder_layers(model, given.arch), CPU if given.checkpoint is None else given.device
    return Placement(model, layers, to, one_at_a_time=plan.one_layer_at_a_time, in_float32=plan.in_float32)


def tokenizer_of(checkpoint: Checkpoint | None) -> PreTrainedTokenizerBase:
    """Return the checkpoint's tokenizer; there is a checkpoint wherever none was handed over."""
    assert checkpoint is not None
    return load_tokenizer(checkpoint)


def loaded(given: Given, plan: MemoryPlan) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the model with its weights, in ordinary memory or mapped, and what was changed of one in memory."""
    model, checkpoint = given.shape, given.checkpoint
    if checkpoint is None:
        check_finite(model)
        return model, restore_buffers(model)
    # On the way to a device weights need not pass through memory.
    mapped = (plan.weights_on_disk or given.device.type != "cpu") and checkpoint.gguf_file is None
    given.shape = load_model(checkpoint, mapped=mapped)
    return given.shape, ()


def store_for(
    out: Path | None,
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    computes: dict[str, Any],
    log: RunLog,
    *,
    resume: bool,
    overwrite: bool,
    tell: Callable[[str], None],
) -> AbstractContextManager[Store]:
    """Return the store of a run that can be resumed, see `Store.open`; for any other one a store that keeps nothing.

    `checkpoint`: None for a model in memory, which a run cuts in place, so that it is not what it was.
    `computes`: where and in what, as far as the recipe leaves that to the machine.
    Raises CheckpointError if such a run is to `resume`.
    """
    if out is None or checkpoint is None:
        if resume:
            raise CheckpointError(
                "resume: only a run that writes to out and reads its model from files can go on; give both as paths, "
                "or leave resume out."
            )
        return nullcontext(Store(log=log))
    if not is_first():
        return nullcontext(Store(log=log, label=str(out)))
    inputs = inputs_of(recipe, checkpoint) | {"computes": computes}
    options = {"resume": resume, "overwrite": overwrite, "protected": checkpoint.directory, "tell": tell}
    return Store.open(out, inputs, log, **options)


def inputs_of(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return all that the result depends on and that is known before a weight is read.

    Calibration text and measured prices are not.
    """
    return {
        "recipe": recipe.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
        "model config": json.loads(checkpoint.config.to_json_string(use_diff=False)),
        "model file": weight_digests(checkpoint),
        "version of": versions(),
    }
