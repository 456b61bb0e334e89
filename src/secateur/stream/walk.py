"""The walk: run a model layer by layer over calibration blocks, following the pruned stream.

In: a model and token blocks. Out: each layer's inputs, replayed with that layer's own keyword arguments, as often as
asked; `advance` moves the stream through a layer once it has its final shape. Blocks have equal length, no padding.
Where layers come to a device one at a time, `at_hand` has one there.

Letters: B blocks of a batch, T tokens of a block, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.facts import Arguments, Batch
from secateur.model.bind import Arch, decoder_layers
from secateur.stream.device import release_freed
from secateur.stream.offload import fetch, settle

"""What a layer is called with besides the hidden states, by position and by name."""

# Small batches stay in a processor's cache and hold little memory; other devices want work for thousands of cores.
CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS = 512, 8192
# Layers without which a model is measured together: a few share their walk, many would be measured for nothing.
LAYERS_AT_ONCE = 4


def make_batches(domain: str, ids_NT: Tensor, *, held_out: bool, batch_tokens: int | None = None) -> list[Batch]:
    """Split a domain's blocks into batches of at most `batch_tokens` tokens (at least one block each).

    None: as many as suit the device that the blocks are on.
    """
    suited = CPU_BATCH_TOKENS if ids_NT.device.type == "cpu" else DEVICE_BATCH_TOKENS
    size = max(1, (batch_tokens or suited) // ids_NT.shape[1])
    parts = enumerate(ids_NT.split(size))
    return [Batch(domain, held_out, ids_BT, number * size) for number, ids_BT in parts]


class Walk:
    """Holds the stream: one hidden-state tensor per batch, as it enters the current layer.

    With `dense`, a second stream follows the layers as they are when `advance_dense` is called, before any cut.
    """

    def __init__(self, model: nn.Module, arch: Arch, batches: list[Batch], *, dense: bool = False) -> None:
        self.batches, self.arch = batches, arch
        self.layers = decoder_layers(model, arch)
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}
        self.hidden_BTD = [self._embed(model.get_submodule(arch.backbone), batch.ids_BT) for batch in batches]
        self.dense_BTD = list(self.hidden_BTD) if dense else []
        self._in_middle = False

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Within the context layer `index` is at hand, see `at_hand`."""
        with at_hand(self.layers[index]) as layer:
            yield layer

    def run(self, index: int, *, to_middle: bool = False, to_end: bool = False) -> Iterator[tuple[Batch, Tensor]]:
        """Run layer `index` on every batch and yield (batch, the layer's output).

        The stream does not move; with `to_middle` it moves through the layer's attention, so that `advance` has only
        the MLP left to do: the caller will change nothing of the attention any more. Where the family has no such
        middle it does not move. With `to_end` it moves through the whole layer, which the caller will not change at
        all, and `advance` must not be called.
        """
        to_middle = to_middle and self.arch.middle is not None
        entered: list[Tensor] = []
        middle = self.layers[index].get_submodule(self.arch.middle or "")
        handle = middle.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        try:
            for position, batch in enumerate(self.batches):
                output = self.through(index, self.hidden_BTD[position], rest=self._in_middle)
                if to_middle or to_end:
                    self.hidden_BTD[position] = output if to_end else entered[0]
                entered.clear()
                yield batch, output
        finally:
            handle.remove()
        self._in_middle = (to_middle or self._in_middle) and not to_end

    def advance(self, index: int) -> None:
        """Move the stream through layer `index` as it is now, or through what `run` has left of it."""
        for position, hidden in enumerate(self.hidden_BTD):
            self.hidden_BTD[position] = self.through(index, hidden, rest=self._in_middle)
        self._in_middle = False

    def advance_dense(self, index: int) -> None:
        """Move the dense stream through layer `index`, which must be as it was before the first cut."""
        for position, hidden in enumerate(self.dense_BTD):
            self.dense_BTD[position] = self.through(index, hidden)

    @torch.inference_mode()
    def leave(self, backbone: nn.Module, position: int) -> Tensor:
        """Return what the backbone makes of a batch whose stream has moved through the last layer."""
        with forwards_replaced(self.layers, lambda *_, **__: self.arch.layer_output(self.hidden_BTD[position])):
            return backbone(self.batches[position].ids_BT, use_cache=False).last_hidden_state

    @torch.inference_mode()
    def through(self, index: int, hidden_BTD: Tensor, *, rest: bool = False) -> Tensor:
        """Return what layer `index` makes of a hidden state; no stream moves.

        With `rest` only what lies behind its attention runs, which then gives zeros.
        """
        # Masks and rotary embeddings differ per layer in some families, so every layer gets its own arguments.
        args, kwargs = self._arguments[hidden_BTD.shape[0], hidden_BTD.shape[1]][index]
        attention = [self.layers[index].get_submodule(self.arch.attention or "")] if rest else []
        with forwards_replaced(attention, lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)):
            output = self.layers[index](hidden_BTD, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.inference_mode()
    def _embed(self, backbone: nn.Module, ids_BT: Tensor) -> Tensor:
        """Return what enters the first layer, and note every layer's arguments for this shape.

        The backbone's own forward runs with its layers bypassed, so whatever it prepares is prepared as always.
        """
        entered: list[Tensor] = []
        noted: list[Arguments] = []

        def bypass(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            entered.append(hidden)
            noted.append((args, kwargs))
            return self.arch.layer_output(hidden)

        with forwards_replaced(self.layers, bypass):
            backbone(ids_BT, use_cache=False)
        self._arguments.setdefault((ids_BT.shape[0], ids_BT.shape[1]), noted)
        return entered[0]


@contextmanager
def at_hand(layer: nn.Module) -> Iterator[nn.Module]:
    """Within the context the layer's weights are where it computes, to be read and changed.

    Afterwards what was changed is rounded to what the layer is stored in, and freed memory goes back to the system.
    """
    fetch(layer)
    yield layer
    settle(layer)
    release_freed()


class forwards_replaced:
    """Within the context every module's forward is `forward`; afterwards its own again."""

    def __init__(self, layers: list[nn.Module], forward: Callable[..., Any]) -> None:
        self.layers, self.forward = layers, forward

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.forward = self.forward

    def __exit__(self, *exception: object) -> None:
        for layer in self.layers:
            del layer.forward
