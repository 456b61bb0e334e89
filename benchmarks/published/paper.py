"""Our reconstruction of arXiv 2601.02674: the product's `preset: paper`.

Eight rounds of equal steps, each measured anew; channels by the size of their output on the hybrid
set; no weight is updated. The paper's score and schedule are not public (docs/scores.md).
"""

from pruned import Pruned, count_parameters
from torch import Tensor
from transformers import PreTrainedModel

from secateur.data.blocks import Blocks, LearningDomain, LearningText
from secateur.facts import Size
from secateur.model.bind import bind
from secateur.pruning.loop import prune_together
from secateur.pruning.open import Opened
from secateur.pruning.resolve import checked, resolve
from secateur.pruning.run import Run
from secateur.recipe import parse_recipe
from secateur.store import Services

ALIGN = 8


def prune(model: PreTrainedModel, blocks_NT: Tensor, share: float, seed: int) -> Pruned:
    """Remove `share` of all parameters from the FFNs, equal widths in all layers.

    The blocks are pooled, so they may come as one domain. The loop watches a held-out block, here the
    first one again; without compensation nothing is judged by it.
    """
    settings = {
        "preset": "paper",
        "remove": {"share": share, "align": ALIGN},
        "calibration": {"sequence_length": blocks_NT.shape[1], "num_tokens": blocks_NT.numel()},
        "seed": seed,
    }
    opened = Opened(None, model, bind(model), Size.of(model), parse_recipe(settings), model.device)
    resolved = resolve(checked(opened))
    blocks = Blocks.of(blocks_NT)
    text = LearningText((LearningDomain("hybrid", 1.0, blocks, len(blocks), blocks[:1]),), blocks_NT.shape[1])
    prune_together([Run(model=model, arch=resolved.arch, resolved=resolved, text=text, services=Services())])
    return Pruned(model, count_parameters(model), "none", "eight rounds, widths a multiple of 8")
