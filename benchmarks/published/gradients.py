"""Gradients of the loss of language modelling by the weights of the layers."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from units import layers_of

TOKENS_PER_BATCH = 2048


def accumulate(model: PreTrainedModel, rows_NT: Tensor) -> None:
    """Leaves in `.grad` of the layers' parameters the gradient of the mean of the rows' losses."""
    model.requires_grad_(False)
    layers_of(model).requires_grad_(True)
    model.zero_grad()
    with torch.enable_grad():
        for batch_NT in rows_NT.split(max(1, TOKENS_PER_BATCH // rows_NT.shape[1])):
            loss = model(input_ids=batch_NT, labels=batch_NT, use_cache=False).loss
            (loss * batch_NT.shape[0] / rows_NT.shape[0]).backward()


def clear(model: PreTrainedModel) -> None:
    """Drops the gradients; every parameter may be trained again."""
    model.zero_grad()
    model.requires_grad_(True)


def salience(weight: Tensor) -> Tensor:
    """|w times its gradient|, the first-order change of the loss when `weight` goes."""
    assert weight.grad is not None
    return (weight.detach() * weight.grad).abs()
