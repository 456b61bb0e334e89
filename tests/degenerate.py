"""Random inputs for `hypothesis`, with what real models have: dead, equal, constant and loud channels, few tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies

SPECIAL = ("dead", "equal", "constant", "loud")
LOUD = 1000.0


@dataclass(frozen=True)
class Drawn:
    """What one example is made of; the tensors follow from it."""

    seed: int
    num_tokens: int
    num_channels: int
    special: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32

    @property
    def x_TF(self) -> torch.Tensor:
        """The inputs: noise around a mean, and one channel for each word in `special`."""
        generator = torch.Generator().manual_seed(self.seed)
        x_TF = 3 * torch.randn(self.num_tokens, self.num_channels, generator=generator) + 1
        for place, word in enumerate(self.special):
            column = place % self.num_channels
            match word:
                case "dead":
                    x_TF[:, column] = 0
                case "equal":
                    x_TF[:, column] = x_TF[:, -1]
                case "constant":
                    x_TF[:, column] = 2.5
                case "loud":
                    x_TF[:, column] *= LOUD
        return x_TF.to(self.dtype)

    def other(self, num_columns: int, salt: int = 1) -> torch.Tensor:
        """Return noise with as many tokens, another for each `salt`."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * salt)
        return torch.randn(self.num_tokens, num_columns, generator=generator).to(self.dtype)


def drawn(
    *, max_tokens: int = 40, channels: Any = (1, 19), special: Any = SPECIAL, dtypes: Any = (torch.float32,)
) -> strategies.SearchStrategy[Drawn]:
    """Return a strategy for inputs; tokens may be fewer than channels, down to one."""
    sizes = {"num_tokens": strategies.integers(1, max_tokens), "num_channels": strategies.integers(*channels)}
    words = strategies.lists(strategies.sampled_from(special), max_size=4).map(tuple)
    parts = {"seed": strategies.integers(0, 999), **sizes, "special": words, "dtype": strategies.sampled_from(dtypes)}
    return strategies.builds(Drawn, **parts)
