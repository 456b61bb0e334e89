"""The walk: run a model layer by layer over calibration blocks, following the pruned stream.

In: a model and token blocks. Out: each layer's inputs, replayed with that layer's own keyword arguments, as often as
asked; `advance` moves the stream through a layer once it has its final shape. Blocks have equal length, no padding.

Letters: B blocks of a batch, T tokens of a block, D hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.arch import Arch, decoder_layers

# Small batches stay in the processor's cache and hold little memory; on a GPU the caller asks for more.
BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks of one domain. `held_out` ones feed the guard and the evaluation, never a statistic."""

    domain: str
    held_out: bool
    ids_BT: Tensor


def make_batches(domain: str, ids_NT: Tensor, *, held_out: bool, batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Split a domain's blocks into batches of at most `batch_tokens` tokens (at least one block each)."""
    size = max(1, batch_tokens // ids_NT.shape[1])
    return [Batch(domain, held_out, ids_BT) for ids_BT in ids_NT.split(size)]


class Walk:
    """Holds the stream: one hidden-state tensor per batch, as it enters the current layer."""

    def __init__(self, model: nn.Module, arch: Arch, batches: list[Batch]) -> None:
        self.batches = batches
        self.layers = decoder_layers(model, arch)
        self._kwargs: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self.hidden_BTD = [self._embed(model.get_submodule(arch.backbone), batch.ids_BT) for batch in batches]

    def run(self, index: int) -> Iterator[tuple[Batch, Tensor]]:
        """Run layer `index` on every batch and yield (batch, the layer's output); the stream does not move."""
        for batch, hidden in zip(self.batches, self.hidden_BTD, strict=True):
            yield batch, self._forward(index, hidden)

    def advance(self, index: int) -> None:
        """Move the stream through layer `index` as it is now."""
        for position, hidden in enumerate(self.hidden_BTD):
            self.hidden_BTD[position] = self._forward(index, hidden)

    @torch.inference_mode()
    def _forward(self, index: int, hidden_BTD: Tensor) -> Tensor:
        # Masks and rotary embeddings differ per layer in some families, so every layer gets its own arguments.
        kwargs = self._kwargs[hidden_BTD.shape[0], hidden_BTD.shape[1]][index]
        output = self.layers[index](hidden_BTD, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.inference_mode()
    def _embed(self, backbone: nn.Module, ids_BT: Tensor) -> Tensor:
        """Return what enters the first layer, and note every layer's keyword arguments for this shape.

        The backbone's own forward runs with its layers bypassed, so whatever it prepares is prepared as always.
        """
        entered: list[Tensor] = []
        noted: list[dict[str, Any]] = []

        def bypass(hidden: Tensor, **kwargs: Any) -> Tensor:
            entered.append(hidden)
            noted.append(kwargs)
            return hidden

        with _forwards_replaced(self.layers, bypass):
            backbone(ids_BT, use_cache=False)
        self._kwargs.setdefault((ids_BT.shape[0], ids_BT.shape[1]), noted)
        return entered[0]


class _forwards_replaced:
    """Within the context every layer's forward is `forward`; afterwards its own again."""

    def __init__(self, layers: list[nn.Module], forward: Callable[..., Tensor]) -> None:
        self.layers, self.forward = layers, forward

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.forward = self.forward

    def __exit__(self, *exception: object) -> None:
        for layer in self.layers:
            del layer.forward
