"""Gram matrices for tests: of inputs, or of any symmetric matrix."""

import torch

from secateur.stream.statistics import Gram


def gram_of(x_TF: torch.Tensor) -> Gram:
    """Return the Gram matrix of some inputs."""
    gram = Gram(x_TF.shape[1], x_TF.device)
    gram.add_product(x_TF)
    return gram


def gram_from(symmetric_FF: torch.Tensor) -> Gram:
    """Return a Gram object that holds this matrix, whether inputs could have made it or not."""
    gram = Gram(len(symmetric_FF), symmetric_FF.device)
    for start, stop, block in zip(gram.starts, gram.stops, gram.blocks, strict=True):
        block.copy_(symmetric_FF[start:stop, :stop])
    return gram
