"""FLAP (An et al., AAAI 2024) as its code has it: AL-AM, metric WIFV, bias compensation.

One pass of the dense model. A channel's score is the fluctuation of the input of `o_proj` or
`down_proj`, times the squared norm of the column; squared for heads. Scores are standardised over
the channels of each layer, a head's is the mean of its channels, and one threshold cuts heads and
channels of all layers. What is removed is replaced by its mean, in the bias of the reader.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pruned import Pruned, count_parameters
from torch import Tensor, nn
from transformers import PreTrainedModel
from units import Kept, cut, heads_of, keep_share, layers_of, rows_of

LENGTH, BATCH = 128, 16


class Fluctuation:
    """Running mean and fluctuation of the inputs of `linear`, sample by sample as published.

    The published update reads the mean twice after it has been changed: a sample's deviation is
    taken from the mean that it is already part of, and the first sample adds none.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.num = linear, 0
        self.mean_C = torch.zeros(linear.in_features)
        self.fluctuation_C = torch.zeros(linear.in_features)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        for sample_TC in args[0].float():
            self.mean_C = (self.mean_C * self.num + sample_TC.mean(0)) / (self.num + 1)
            if self.num > 0:
                self.fluctuation_C *= (self.num - 1) / self.num
                self.fluctuation_C += (sample_TC - self.mean_C).square().sum(0) / (self.num + 1)
            self.num += 1

    def score_C(self) -> Tensor:
        """WIFV: fluctuation times the squared norm of the column."""
        return self.fluctuation_C * self.linear.weight.data.square().sum(0)


@contextmanager
def _watched(linears: list[nn.Linear]) -> Iterator[list[Fluctuation]]:
    watchers = [Fluctuation(linear) for linear in linears]
    handles = [linear.register_forward_pre_hook(watcher) for linear, watcher in zip(linears, watchers, strict=True)]
    try:
        yield watchers
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure(model: PreTrainedModel, rows_NT: Tensor) -> tuple[list[Fluctuation], list[Fluctuation]]:
    """The inputs of every `o_proj` and every `down_proj` on the dense stream."""
    layers = layers_of(model)
    with (
        _watched([layer.self_attn.o_proj for layer in layers]) as attention,
        _watched([layer.mlp.down_proj for layer in layers]) as ffn,
    ):
        for batch_NT in rows_NT.split(BATCH):
            model.model(input_ids=batch_NT, use_cache=False)
    return attention, ffn


def scores(attention: list[Fluctuation], ffn: list[Fluctuation], head_dim: int) -> tuple[Tensor, Tensor]:
    """Standardised scores of heads [L, H] and of channels [L, C]."""
    heads_LD = _standardised(torch.stack([watcher.score_C().square() for watcher in attention]))
    channels_LC = _standardised(torch.stack([watcher.score_C() for watcher in ffn]))
    return heads_LD.unflatten(1, (-1, head_dim)).mean(2), channels_LC


def _standardised(scores_LC: Tensor) -> Tensor:
    return (scores_LC - scores_LC.mean(1, keepdim=True)) / scores_LC.std(1, keepdim=True)


def compensate(model: PreTrainedModel, kept: Kept, attention: list[Fluctuation], ffn: list[Fluctuation]) -> None:
    """Adds the mean of what goes, through its columns, to the bias of the reader."""
    keep_LD = kept.heads.repeat_interleave(heads_of(model).dim, dim=1)
    for watchers, keeps in ((attention, keep_LD), (ffn, kept.channels)):
        for watcher, keep_C in zip(watchers, keeps, strict=True):
            bias = (watcher.linear.weight.data * (watcher.mean_C * ~keep_C)).sum(1)
            old = watcher.linear.bias
            watcher.linear.bias = nn.Parameter(bias if old is None else bias + old.data)


def prune(model: PreTrainedModel, blocks_NT: Tensor, share: float, seed: int) -> Pruned:
    """Removes `share` of all parameters of `model`, in place; deterministic, `seed` is not used."""
    rows_NT = rows_of(blocks_NT, LENGTH)
    attention, ffn = measure(model, rows_NT)
    scores_LH, scores_LC = scores(attention, ffn, heads_of(model).dim)
    num_biases = sum(w.linear.out_features for w in attention + ffn if w.linear.bias is None)
    total = count_parameters(model)
    kept = keep_share(model, scores_LH, scores_LC, share * total + num_biases)
    compensate(model, kept, attention, ffn)
    num_zeros = cut(model, kept)
    notes = f"{rows_NT.shape[0]} rows of {rows_NT.shape[1]} tokens (published: 2,048 of 128 of WikiText-2)"
    return Pruned(model, count_parameters(model) - num_zeros, "bias", notes)
