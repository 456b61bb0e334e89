"""The ratio of a method that cuts every layer alike, for a share of all parameters."""

from typing import NamedTuple

from pruned import count_parameters
from transformers import PreTrainedModel


class Uniform(NamedTuple):
    """What every pruned layer loses. A unit of attention is a head, or a key/value head with its readers."""

    num_heads: int
    num_channels: int

    def __str__(self) -> str:
        return f"{self.num_heads} attention units and {self.num_channels} channels a layer"


def uniform(model: PreTrainedModel, num_layers: int, num_units: int, unit_rows: int, share: float) -> Uniform:
    """Heads and channels that each of `num_layers` layers loses so that `share` of `model` goes.

    The methods remove `int(ratio x units)` heads and `int(ratio x channels)` channels. Where a
    head more or less steps over the share, the ratio of the channels alone gives way; among
    the counts of heads, the one wins whose channels' ratio asks for it, or is nearest to that.
    `unit_rows`: rows and columns that go with a unit of attention, each of the hidden width.
    """
    width, channels = model.config.hidden_size, model.config.intermediate_size
    rows = share * count_parameters(model) / (num_layers * width)
    plans = []
    for num_heads in range(num_units):
        num_channels = round((rows - num_heads * unit_rows) / 3)
        if 0 <= num_channels < channels:
            wanted = num_channels / channels * num_units
            distance = max(num_heads - wanted, wanted - num_heads - 1, 0.0)
            plans.append((distance, -num_heads, Uniform(num_heads, num_channels)))
    if not plans:
        raise ValueError(f"{share:.0%} of all parameters is more than {num_layers} layers can lose; ask for less")
    return min(plans)[2]
