"""A run's model, opened: its architecture bound once; weights and text only when asked for.

All that needs no weights is checked before one is read; see `resolve.checked` for the recipe.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import RecipeError
from secateur.facts import Ancestor, Size
from secateur.log import versions
from secateur.model.bind import Arch, bind, decoder_layers
from secateur.model.checkpoint import (
    Checkpoint,
    check_finite,
    check_in_memory,
    check_weights,
    load_model,
    load_tokenizer,
    notes_on,
    open_checkpoint,
    planned_model,
    restore_buffers,
    weight_digests,
)
from secateur.model.group import Keeps
from secateur.model.identity import in_memory, lineage, name_of
from secateur.model.stock import CausalLM, Tokenizer
from secateur.ranks import check_same, device_called, size
from secateur.recipe import Keys, Recipe, dump_recipe
from secateur.stream.device import CPU, LOW, Placement, multiplies_in_software
from secateur.vocabulary.kept import KeptTokens, Trim

# These keys change no byte of the result.
_WITHOUT_EFFECT = {"machine": {"memory_budget", "device_budget"}}
# Numbers hashed per parameter: enough to tell revisions apart without reading whole files.
NUMBERS_SAMPLED = 64


@dataclass(frozen=True, slots=True)
class Like:
    """A result whose units go here too, as its files have them.

    `digest`: of its keep.json. `tokens`: those that stay; None if it has all.
    """

    checkpoint: Checkpoint
    result: Ancestor
    digest: str
    keeps: Keeps
    tokens: KeptTokens | None


@dataclass(frozen=True, slots=True)
class Opened:
    """A dense model and its recipe. `checkpoint`: None for a model in memory.

    `model`: the one in memory, or the checkpoint's, on the meta device until `loaded`. `size`: as
    stored. `device`: where the run computes. `tokenizer`: the one handed over, if any. `trim`: what
    goes of the vocabulary, decided before the weights are cut. `like`: the result that it is cut
    by. `on_disk`: whether its weights, once loaded, stay in their files. `notes`: for people, on
    the weights.
    """

    checkpoint: Checkpoint | None
    model: CausalLM
    arch: Arch
    size: Size
    recipe: Recipe
    device: torch.device
    tokenizer: Tokenizer | None = None
    trim: Trim | None = None
    like: Like | None = None
    on_disk: bool | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The user's name for the model."""
        if self.checkpoint is not None:
            return self.checkpoint.reference
        return str(self.model.config._name_or_path or type(self.model).__name__)

    @property
    def public_name(self) -> str:
        """The name of the model in files, which holds no path of this machine."""
        return self.lineage[-1].name if self.checkpoint is None else name_of(self.checkpoint)

    @property
    def lineage(self) -> tuple[Ancestor, ...]:
        """The models that the result comes from, the original first."""
        if self.checkpoint is None:
            return in_memory(self.name, self.size.num_params)
        return lineage(self.checkpoint, self.size.num_params)

    @property
    def vocabulary_left(self) -> int | None:
        """The tokens that stay; None if all do, or if it is not known yet."""
        return self.trim and self.trim.kept.num_kept

    @property
    def directory(self) -> Path | None:
        """The directory of the model's files; None for a model in memory."""
        return self.checkpoint and self.checkpoint.directory

    def asking(self, recipe: Recipe) -> "Opened":
        """Return the same model with another recipe, not checked yet."""
        return replace(self, recipe=recipe, device=_device_for(recipe, self.checkpoint, self.model))

    def filled(self, **groups: Keys) -> "Opened":
        """Return the same model with other values in groups of its recipe, see `Recipe.filled`."""
        return replace(self, recipe=self.recipe.filled(**groups))


def open_model(
    model: CausalLM | str | Path,
    recipe: Recipe,
    tokenizer: Tokenizer | None = None,
    *,
    out: Path | str | None = None,
    weights: bool = True,
) -> Opened:
    """Return the model with its architecture bound; a checkpoint's weights are not read.

    `out`: where the result is to be loaded from. `weights`: the files of weights must be there, and
    fit the config. Raises a SecateurError if the
    model cannot be opened or its family is not known.
    """
    if isinstance(model, str | Path):
        checkpoint = open_checkpoint(model, weights=weights)
        model = planned_model(checkpoint)
    else:
        check_in_memory(model, tokenizer, out)
        checkpoint = None
    arch = bind(model)
    if checkpoint is not None and weights:
        check_weights(checkpoint, model)
    return Opened(
        checkpoint,
        model,
        arch,
        Size.of(model),
        recipe,
        _device_for(recipe, checkpoint, model),
        tokenizer,
    )


def _device_for(recipe: Recipe, checkpoint: Checkpoint | None, model: CausalLM) -> torch.device:
    """Return the run's device, that of a model in memory. Raises RecipeError if there is none."""
    if checkpoint is not None:
        return device_called(recipe.machine.device)
    if recipe.machine.device_budget is not None:
        raise RecipeError(
            "machine.device_budget: a model in memory stays where it is; give its path, or leave "
            "it out."
        )
    if (
        recipe.machine.device is not None
        and device_called(recipe.machine.device).type != model.device.type
    ):
        raise RecipeError(
            f"machine.device: is {recipe.machine.device}, and the model in memory is on "
            f"{model.device}; move the model, or leave device out."
        )
    return model.device


def computes_in_float32(opened: Opened) -> bool:
    """Return whether layers are computed in float32 and stored in their own dtype.

    Default: if the device multiplies their dtype in software and the recipe does not limit memory.
    Raises RecipeError if the recipe asks for it where it cannot be.
    """
    machine, checkpoint, dtype = opened.recipe.machine, opened.checkpoint, opened.model.dtype
    is_asked = machine.compute_dtype == "float32"
    if checkpoint is None or machine.memory_budget is not None:
        if is_asked:
            why = (
                "memory_budget, which keeps weights in their files"
                if checkpoint
                else "a model in memory; convert it"
            )
            raise RecipeError(
                f"machine.compute_dtype: float32 does not go with {why}; leave one of them out."
            )
        return False
    if dtype not in LOW:
        return False
    return is_asked or (
        machine.compute_dtype is None and multiplies_in_software(opened.device, dtype)
    )


def tokenizer_of(opened: Opened) -> Tokenizer:
    """Return the trimmed tokenizer, the one that was handed over, or the checkpoint's."""
    if opened.trim is not None:
        return opened.trim.tokenizer
    if opened.tokenizer is not None:
        return opened.tokenizer
    assert opened.checkpoint is not None, "no model in memory is opened without a tokenizer"
    return load_tokenizer(opened.checkpoint)


def loaded(opened: Opened, *, on_disk: bool) -> Opened:
    """Return the model with weights, mapped if `on_disk`, and notes on them.

    One that was loaded so before is returned as it is.
    """
    model, checkpoint = opened.model, opened.checkpoint
    if opened.on_disk == on_disk:
        return opened
    if checkpoint is None:
        check_finite(model)
        return replace(opened, notes=opened.notes + restore_buffers(model))
    # Weights for a device need not pass through the host's memory.
    model = load_model(checkpoint, mapped=on_disk or opened.device.type != "cpu")
    notes = notes_on(checkpoint, model)
    return replace(opened, model=model, size=Size.of(model), on_disk=on_disk, notes=notes)


def onload(
    opened: Opened, *, in_float32: bool, one_at_a_time: bool = False, keeps: bool = False
) -> Placement:
    """Bring the loaded model to the run's device; a model in memory stays where it is. Arguments:
    of `Placement`.
    """
    placement = Placement(
        opened.model,
        decoder_layers(opened.model, opened.arch),
        CPU if opened.checkpoint is None else opened.device,
        one_at_a_time=one_at_a_time,
        in_float32=in_float32,
        keeps=keeps,
    )
    placement.onload()
    return placement


def inputs_of(opened: Opened, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a result depends on before a weight is read: no text, but what the recipe leaves
    to the machine.
    """
    return {
        "recipe": opened.recipe.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
        "model config": json.loads(checkpoint.config.to_json_string(use_diff=False)),
        "model file": weight_digests(checkpoint),
        "version of": versions(),
        "computes": {
            "device": str(opened.device),
            "in float32": computes_in_float32(opened),
            "units that stay": opened.like and opened.like.digest,
        },
    }


def check_same_run(model: CausalLM, recipe: Recipe) -> None:
    """Raise RankError if another rank has another recipe, model, precision or version."""
    if size() == 1:
        return
    check_same(
        {
            "recipe": dump_recipe(recipe),
            "model (config.json)": str({**model.config.to_dict(), "_name_or_path": ""}),
            "model (weights)": _digest(model),
            "set of installed versions": str(versions()),
        }
    )


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:NUMBERS_SAMPLED].cpu().double()
        digest.update(
            name.encode()
            + str((parameter.dtype, tuple(parameter.shape))).encode()
            + first.numpy().tobytes()
        )
    return digest.hexdigest()
