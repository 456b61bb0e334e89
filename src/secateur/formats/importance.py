"""An importance matrix for llama.cpp's quantiser: how loud each input channel of a weight is, over all domains.

The quantiser then rounds so that sum_c importance_c (w_c - q_c)^2 is small in place of the plain sum.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.data.blocks import block_length
from secateur.errors import CalibrationError
from secateur.formats.gguf_families import gguf_family
from secateur.formats.gguf_tensors import gguf_tensors
from secateur.formats.run_text import run_text_again
from secateur.log import Progress
from secateur.model.bind import bind
from secateur.model.checkpoint import Checkpoint, load_model, load_tokenizer
from secateur.recipe import RECIPE_FILE, as_recipe
from secateur.stream.walk import make_batches

NUM_TOKENS = 16_384  # of all domains together


@torch.inference_mode()
def importance_of(checkpoint: Checkpoint, progress: Progress) -> dict[str, Float[np.ndarray, " C"]]:
    """Return the importance of the columns of the layers' matrices, by their names in a file.

    importance_c = mean over domains d of E_d[x_c^2] / mean_c' E_d[x_c'^2], x the matrix's input: a domain
    counts alike however loud it is. Experts, and matrices that a file holds joined or in halves, have
    none. The text is what the run that made the checkpoint learnt by, else that of a recipe's default
    domains. Raises CalibrationError or RecipeError for text that cannot be read.
    """
    # The text that the run learnt by.
    path = checkpoint.directory / RECIPE_FILE
    recipe = as_recipe(path if path.is_file() else None)
    length = block_length(recipe.calibration.sequence_length, checkpoint.config)
    num_tokens = recipe.calibration.num_tokens or NUM_TOKENS
    recipe = recipe.filled(calibration={"sequence_length": length, "num_tokens": num_tokens})
    directory, tokenizer = checkpoint.directory, load_tokenizer(checkpoint)
    text = run_text_again(directory, recipe, tokenizer, progress, num_training_tokens=NUM_TOKENS).learning.text
    blocks = {name: part.ids_NT for name, part in text.training(NUM_TOKENS).items() if not part.is_meta}
    if not blocks:
        raise CalibrationError(
            "export importance: the model's recipe has no text but what its dense model wrote, which is not at hand; "
            "leave importance out."
        )

    # Sum the squares of what each matrix reads, domain by domain.
    model: Any = load_model(checkpoint).float()
    backbone = model.get_submodule(bind(model).backbone)
    squares: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums = inputs[0].flatten(0, -2).double().square().sum(0)
        squares[name] = squares[name] + sums if name in squares else sums

    matrices = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [linear.register_forward_pre_hook(partial(add, name)) for name, linear in matrices.items()]
    importance: dict[str, Tensor] = {}
    num_done, num_blocks = 0, sum(map(len, blocks.values()))
    for domain, ids_NT in blocks.items():
        squares.clear()
        for batch in make_batches(domain, ids_NT, held_out=False):
            backbone(batch.ids_BT, use_cache=False)
            num_done += len(batch.ids_BT)
            progress("importance", num_done, num_blocks)
        for name, sums in squares.items():
            share = sums / sums.mean().clamp_min(1e-30) / len(blocks)
            importance[name] = importance.get(name, torch.zeros_like(sums)) + share
    for hook in hooks:
        hook.remove()

    # By the names that the file has.
    tensors = gguf_tensors(checkpoint, gguf_family(checkpoint), "f32")
    columns = {tensor.gguf_name: importance.get(tensor.name.removesuffix(".weight")) for tensor in tensors}
    return {name: means.float().numpy() for name, means in columns.items() if means is not None}
