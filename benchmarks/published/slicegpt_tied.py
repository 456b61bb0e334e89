"""SliceGPT with the embedding left whole and tied: the same function, fewer parameters.

As published, a tied head gets weights of its own. Here one matrix of D x d behind the embedding
takes the stream to the sliced basis, and the last layer writes in the dense basis, where the tied
head reads. At equal parameters the stream keeps more dimensions.
"""

import slicegpt
import torch
from pruned import Pruned
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def prune(model: PreTrainedModel, blocks_NT: Tensor, share: float, seed: int) -> Pruned:
    """Slice to the width at which `share` of all parameters is gone; the embedding stays tied."""
    return slicegpt.sliced(model, blocks_NT, share, tied=True)
