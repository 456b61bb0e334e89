"""What a family does to its head's output before it is logits: a factor, a cap.

In: a family's `logits` section and a config. Out: a module that maps the last hidden state to the model's own logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.arch_spec import LogitsSpec
from secateur.errors import ArchError


@dataclass(frozen=True, slots=True)
class Logits:
    """logits = head(x) * multiply / divide; where there is a cap, cap * tanh(logits / cap)."""

    multiply: float
    divide: float
    cap: float | None


def bind_logits(spec: LogitsSpec, config: Any, family: str) -> Logits:
    """Return the config's numbers. Raises ArchError if it lacks one that the spec names; only a cap may be None."""
    for key in (spec.multiply, spec.divide, spec.cap):
        if key is not None and not hasattr(config, key):
            raise ArchError(f"logits: config has no '{key}', which family {family} needs.")
    return Logits(
        multiply=1.0 if spec.multiply is None else float(getattr(config, spec.multiply)),
        divide=1.0 if spec.divide is None else float(getattr(config, spec.divide)),
        cap=None if spec.cap is None else getattr(config, spec.cap),
    )


def head_with(head: nn.Module, logits: Logits | None) -> nn.Module:
    """Return the head, followed by what `logits` says."""
    return head if logits is None else _Head(head, logits)


class _Head(nn.Module):
    def __init__(self, head: nn.Module, logits: Logits) -> None:
        super().__init__()
        self.head, self.logits = head, logits

    def forward(self, hidden: Float[Tensor, "*P D"]) -> Float[Tensor, "*P V"]:
        # One operation at a time, as transformers does it, so that rounding is the same.
        values = self.head(hidden)
        if self.logits.multiply != 1:
            values = values * self.logits.multiply
        if self.logits.divide != 1:
            values = values / self.logits.divide
        if self.logits.cap is not None:
            values = torch.tanh(values / self.logits.cap) * self.logits.cap
        return values
