"""GPT-2's linears, which transformers stores transposed (its class `Conv1D`), as linears like all others.

In: modules that may hold a `Conv1D`. Out: the same with an `nn.Linear` in its place, which computes the same and is
read from and written to a state dict as the `Conv1D` would be: saved files do not change.
"""

from typing import Any

import torch
from torch import Tensor, nn

CONV = "Conv1D"


class TransposedLinear(nn.Linear):
    """A linear whose weight is (outputs, inputs) in memory and (inputs, outputs) in a state dict."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T.contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        name = f"{prefix}weight"
        if name in state_dict:
            state_dict[name] = state_dict[name].T
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def linears_for_conv(parent: nn.Module) -> None:
    """Replace every `Conv1D` below `parent`, in place."""
    for module in list(parent.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == CONV:
                setattr(module, name, _linear(child))


@torch.no_grad()
def _linear(conv: Any) -> TransposedLinear:
    weight: Tensor = conv.weight
    with torch.device("meta"):
        linear = TransposedLinear(weight.shape[0], weight.shape[1])
    linear.weight = nn.Parameter(weight.T.contiguous(), requires_grad=weight.requires_grad)
    linear.bias = conv.bias
    return linear.train(conv.training)
