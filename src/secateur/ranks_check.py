"""Before the first forward pass of several ranks: all have the same model.

In: a loaded model, the resolved recipe. Out: an error, if one has another. Nothing happens in one process.
"""

import hashlib

from torch import nn
from transformers import PreTrainedModel

from secateur.ranks import check_same, size
from secateur.recipe import Recipe, dump_recipe
from secateur.summary import versions

# Of every parameter so many numbers are looked at: another revision differs in them, and no file is read whole.
NUM_SAMPLED = 64


def check_same_run(model: PreTrainedModel, recipe: Recipe) -> None:
    """Raise RankError if another rank has another recipe, model, precision or version of the packages."""
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
        first = parameter.detach().flatten()[:NUM_SAMPLED].cpu().double()
        digest.update(name.encode() + str((parameter.dtype, tuple(parameter.shape))).encode() + first.numpy().tobytes())
    return digest.hexdigest()
