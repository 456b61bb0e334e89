"""Special modules: transposed linears (GPT-2), heads that scale or cap logits, and forwards
replaced for a time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.model.stock import replaced


def text_model(model: Any) -> Any:
    """Return the innermost model that has the embedding and a head: what text alone needs, without
    towers.
    """
    inner = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings()
    ]
    return [
        model,
        *(module for module in inner if model.get_input_embeddings() in set(module.modules())),
    ][-1]


class TransposedLinear(nn.Linear):
    """A linear whose weight is (outputs, inputs) in memory, (inputs, outputs) when saved."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T.contiguous()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        name = f"{prefix}weight"
        if name in state_dict:
            state_dict[name] = state_dict[name].T
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def linears_for_conv(parent: nn.Module) -> None:
    """Replace every `Conv1D` below `parent`, in place."""
    for name, module in list(parent.named_modules()):
        if type(module).__name__ == "Conv1D":
            parent.set_submodule(name, _linear(module))


@torch.no_grad()
def _linear(conv: Any) -> TransposedLinear:
    weight: Tensor = conv.weight
    linear = TransposedLinear(conv.nx, conv.nf, device="meta")
    linear.weight = nn.Parameter(weight.T.contiguous(), requires_grad=weight.requires_grad)
    linear.bias = conv.bias
    return linear.train(conv.training)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that is saved with the module, by name."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@dataclass(frozen=True, slots=True)
class Logits:
    """logits = head(x) * multiply / divide; with a cap, cap * tanh(logits / cap)."""

    multiply: float
    divide: float
    cap: float | None


def head_at(model: nn.Module, names: str) -> nn.Module:
    """Return the model's module of that name, or several in a row, whose names are joined by +."""
    modules = [model.get_submodule(name) for name in names.split("+")]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


class ScaledHead(nn.Module):
    """A head followed by what `logits` says."""

    def __init__(self, head: nn.Module, logits: Logits) -> None:
        super().__init__()
        self.head, self.logits = head, logits

    def forward(self, hidden: Float[Tensor, "*P D"]) -> Float[Tensor, "*P V"]:
        """Return the logits."""
        # In transformers' order of operations, so that rounding is the same.
        values = self.head(hidden)
        if self.logits.multiply != 1:
            values = values * self.logits.multiply
        if self.logits.divide != 1:
            values = values / self.logits.divide
        if self.logits.cap is not None:
            values = torch.tanh(values / self.logits.cap) * self.logits.cap
        return values


@contextmanager
def forwards_replaced(modules: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` be every module's forward inside the context."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced(vars(module), "forward", forward))
        yield


def silent_attention(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Return what an attention adds that gives zeros."""
    return torch.zeros_like(hidden_states), None
