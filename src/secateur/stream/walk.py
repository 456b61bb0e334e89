"""The walk: run a model layer by layer over calibration blocks, following the pruned stream.

In: a model and token blocks of equal length, without padding. Out: each layer's inputs, replayed
with that layer's own arguments, as often as asked. `advance` moves the stream through a layer once
it has its final shape. `at_hand` onloads a layer if layers are offloaded.

Letters: B blocks of a batch, T tokens of a block, D hidden size.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.bind import Arch, decoder_layers
from secateur.model.modules import forwards_replaced, silent_attention
from secateur.stream.device import fetch, release_freed, settle

# Small batches stay in a CPU's cache; other devices need work for thousands of cores.
CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS = 512, 8192
# Layer removals that one walk measures together; more would often be wasted.
LAYERS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks of one domain. `held_out`: for the guard and the evaluation, never for statistics.

    `first_block`: the number of its first block in the domain; a rank has only some blocks.
    `counted_BT`: which tokens count, others give context alone; None: all. A position counts if the
    token that it predicts does, and a block's last one if its own token does.
    """

    domain: str
    held_out: bool
    ids_BT: Tensor
    first_block: int = 0
    counted_BT: Tensor | None = None

    def counted(self, values: Tensor) -> Tensor:
        """Return the rows of (..., T, X) values at the positions that count, P x X.

        Values that stand for all tokens several times over, as of every expert, keep their order.
        """
        rows_TX = values.flatten(0, -2)
        if self.counted_BT is None:
            return rows_TX
        predicts_BT = torch.cat([self.counted_BT[:, 1:], self.counted_BT[:, -1:]], dim=1)
        counted_T = predicts_BT.flatten().to(rows_TX.device)
        return rows_TX[counted_T.repeat(len(rows_TX) // len(counted_T))]


def make_batches(
    domain: str,
    ids_NT: Tensor,
    *,
    held_out: bool,
    batch_tokens: int | None = None,
    counted_NT: Tensor | None = None,
) -> list[Batch]:
    """Split a domain's blocks into batches of `batch_tokens` tokens at most, or of one block.

    None: as many as suit the device of the blocks. `counted_NT`: which tokens count, None for all.
    """
    suited = CPU_BATCH_TOKENS if ids_NT.device.type == "cpu" else DEVICE_BATCH_TOKENS
    size = max(1, (batch_tokens or suited) // ids_NT.shape[1])
    pieces = ids_NT.split(size)
    counted = [None] * len(pieces) if counted_NT is None else counted_NT.split(size)
    return [
        Batch(domain, held_out, ids_BT, number * size, counted_BT)
        for number, (ids_BT, counted_BT) in enumerate(zip(pieces, counted, strict=True))
    ]


class Walk:
    """Holds the stream: per batch the hidden states that enter the current layer.

    With `dense`, `advance_dense` moves a second stream through the layers before any cut.
    """

    def __init__(
        self, model: nn.Module, arch: Arch, batches: list[Batch], *, dense: bool = False
    ) -> None:
        self.batches, self.arch = batches, arch
        self.layers = decoder_layers(model, arch)
        self._arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self.hidden_BTD = [
            self._embed(model.get_submodule(arch.backbone), batch.ids_BT) for batch in batches
        ]
        self.dense_BTD = list(self.hidden_BTD) if dense else []
        self._in_middle = False

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """Have layer `index` at hand inside the context, see `at_hand`."""
        return at_hand(self.layers[index])

    def run(
        self, index: int, *, to_middle: bool = False, to_end: bool = False
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Run layer `index` on every batch and yield (batch, the layer's output).

        The stream stays, with two exceptions. `to_middle` moves it through the attention, if the
        family has a middle, so that `advance` runs the MLP only: the attention must not change any
        more. `to_end` moves it through the whole layer, which must not change, instead of
        `advance`.
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
        """Move the stream through layer `index` as it is, or through what `run` left of it."""
        for position, hidden in enumerate(self.hidden_BTD):
            self.hidden_BTD[position] = self.through(index, hidden, rest=self._in_middle)
        self._in_middle = False

    def advance_dense(self, index: int) -> None:
        """Move the dense stream through layer `index`, which must not have been cut yet."""
        for position, hidden in enumerate(self.dense_BTD):
            self.dense_BTD[position] = self.through(index, hidden)

    @torch.inference_mode()
    def through(self, index: int, hidden_BTD: Tensor, *, rest: bool = False) -> Tensor:
        """Return the output of layer `index` for a hidden state; no stream moves.

        With `rest` only the part after its attention runs, and the attention gives zeros.
        """
        # Masks and rotary embeddings differ per layer in some families.
        given = self._arguments[hidden_BTD.shape[0], hidden_BTD.shape[1]][index]
        attention = [self.layers[index].get_submodule(self.arch.attention or "")] if rest else []
        with forwards_replaced(attention, silent_attention):
            return self.arch.step(self.layers[index], index, hidden_BTD, given)

    @torch.inference_mode()
    def _embed(self, backbone: nn.Module, ids_BT: Tensor) -> Tensor:
        """Return the first layer's input, and note every layer's arguments for this shape.

        The backbone's own forward prepares them, with its layers bypassed.
        """
        hidden_BTD, given = self.arch.enter(self.layers, lambda: backbone(ids_BT, use_cache=False))
        self._arguments.setdefault((ids_BT.shape[0], ids_BT.shape[1]), given)
        return hidden_BTD


@contextmanager
def at_hand(layer: nn.Module) -> Iterator[nn.Module]:
    """Have the layer's weights on the device where it computes, to read and change them.

    Afterwards changes are rounded to the stored dtype, and freed memory returns to the system.
    """
    fetch(layer)
    yield layer
    settle(layer)
    release_freed()
