"""Depth: whole decoder layers taken out, and what they added linearly folded into the layer before.

In: a model, the layers to remove (`depth_choice`), calibration batches. Out: the same model with fewer layers, an
ordinary one of its family. Held-out batches judge the patch.

Letters: T tokens, D hidden size, F reader inputs.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.arch import Arch, bind, decoder_layers, linear
from secateur.arch_numbers import text_config
from secateur.compensate import Guard, guard, held_out_errors, held_out_sums
from secateur.errors import ArchError, NumericsError, RecipeError
from secateur.gram import Gram
from secateur.ranks import from_first, sum_tensors
from secateur.score import damped_gram
from secateur.walk import Batch, Walk


def remove_layers(model: nn.Module, arch: Arch, layers: Collection[int]) -> Arch:
    """Remove whole layers in place and return the architecture bound anew; the old one is stale.

    What is left is numbered without gaps, in the modules (a KV cache goes by their `layer_idx`) and in the config: its
    number of layers and every list that has one entry per layer, as `layer_types`.

    Raises RecipeError if a layer is not there or none would stay, ArchError if the config is one of per-layer widths.
    """
    config: Any = text_config(model)
    missing = sorted(set(layers) - set(range(arch.num_layers)))
    if missing or len(set(layers)) == arch.num_layers:
        raise RecipeError(
            f"depth: cannot remove layers {sorted(set(layers))}; the model has layers 0 to {arch.num_layers - 1}, and "
            f"one must stay."
        )
    if getattr(config, "is_heterogeneous", False):
        raise ArchError("depth: the config has per_layer_config; remove layers before widths differ per layer.")
    kept = [index for index in range(arch.num_layers) if index not in layers]
    modules: list[Any] = [decoder_layers(model, arch)[index] for index in kept]
    for number, layer in enumerate(modules):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    parent, _, name = arch.layers.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(modules))
    config.num_hidden_layers = len(kept)
    for key, values in config.to_dict().items():
        if "layer" in key and isinstance(values, list) and len(values) == arch.num_layers:
            setattr(config, key, [values[index] for index in kept])
    return bind(model)


@torch.no_grad()
def fold_patch(model: nn.Module, arch: Arch, layer: int, batches: list[Batch], damping: float) -> Guard:
    """Let the layer before `layer` give what is linear in what `layer` adds. Call it before `remove_layers`.

    With x the input of the previous layer's FFN reader, W its weight and d what `layer` adds to the hidden state, the
    new weight is argmin |x W' + d - x V'|^2 + ridge |V - W|^2 over V, that is W' + (G + ridge I)^-1 x'd with G = x'x
    and ridge = damping * mean(diag G). Sums in float32, solved in float64; no new module, no new bias. The guard's
    errors are shares of |d|^2 on held-out batches, by domain: 1 means that nothing of the layer is given back. Without
    held-out batches the whole step is taken.

    Raises RecipeError for the first layer, which has none before it, ArchError where the family norms what its reader
    gives, NumericsError if the system is indefinite.
    """
    if not 0 < layer < arch.num_layers:
        raise RecipeError(
            f"depth: layer {layer} cannot be folded into the one before it; use 1 to {arch.num_layers - 1}."
        )
    reader = _reader(model, arch, layer - 1)
    from_first(lambda: _check_added_as_it_is(Walk(model, arch, batches[:1]), layer - 1, reader))
    sums = _Sums(reader)
    held_out: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        walk = Walk(model, arch, [batch])
        for index in range(layer - 1):
            walk.advance(index)
        x_TF, added_TD = _input_and_gain(walk, layer - 1, layer, reader, walk.hidden_BTD[0])
        if batch.held_out:
            held_out.setdefault(batch.domain, []).append((x_TF, added_TD))
        else:
            sums.add(x_TF, added_TD)
    change_FD = sums.solve(damping, layer)
    # The guard judges what will be stored, rounding included.
    change_DF = (reader.weight + change_FD.T).to(reader.weight.dtype) - reader.weight.float()
    judged = _judge(held_out, change_DF)
    reader.weight += judged.step * change_DF
    return judged


@torch.no_grad()
def fitted_readers(
    model: nn.Module,
    arch: Arch,
    batches: list[Batch],
    kept: list[int],
    readers: Mapping[int, Tensor],
    asked: Collection[int],
    damping: float,
) -> dict[int, Tensor]:
    """Return, by layer asked for, the FFN reader's weight of the kept layer before it, once it is folded into that.

    As `fold_patch`, for the model of the layers `kept`, with the weights `readers` in place of its own; nothing is
    changed and nothing judged. The first kept layer has none before it and gets none. Held-out batches take no part.
    """
    walk = Walk(model, arch, [batch for batch in batches if not batch.held_out])
    found: dict[int, Tensor] = {}
    with readers_replaced(model, arch, readers):
        for before, layer in pairwise(kept):
            if layer > max(asked):
                break
            if layer in asked:
                reader = _reader(model, arch, before)
                sums = _Sums(reader)
                for hidden_BTD in walk.hidden_BTD:
                    sums.add(*_input_and_gain(walk, before, layer, reader, hidden_BTD))
                found[layer] = reader.weight + sums.solve(damping, layer).T.to(reader.weight.dtype)
            walk.advance(before)
    return found


@contextmanager
def readers_replaced(model: nn.Module, arch: Arch, weights: Mapping[int, Tensor]) -> Iterator[None]:
    """Within the context the FFN readers of these layers have these weights, afterwards their own again."""
    readers = {index: _reader(model, arch, index) for index in weights}
    own = {index: reader.weight.data for index, reader in readers.items()}
    try:
        for index, reader in readers.items():
            reader.weight.data = weights[index]
        yield
    finally:
        for index, reader in readers.items():
            reader.weight.data = own[index]


def _reader(model: nn.Module, arch: Arch, layer: int) -> nn.Linear:
    (group,) = (group for group in arch.select(("ffn",)) if group.layer == layer)
    return linear(decoder_layers(model, arch)[layer], group.reader.module)


class _Sums:
    """Sums over calibration tokens: a reader's inputs x by themselves, and with what they are to give besides, d."""

    def __init__(self, reader: nn.Linear) -> None:
        self.gram = Gram(reader.in_features, reader.weight.device)
        self.cross_FD = reader.weight.new_zeros(reader.in_features, reader.out_features, dtype=torch.float32)

    def add(self, x_TF: Float[Tensor, "T F"], added_TD: Float[Tensor, "T D"]) -> None:
        self.gram.add_product(x_TF)
        self.cross_FD += x_TF.float().T @ added_TD

    def solve(self, damping: float, layer: int) -> Float[Tensor, "F D"]:
        """Return (x'x + ridge I)^-1 x'd, from the sums of all ranks."""
        sum_tensors([*self.gram.blocks, self.cross_FD])
        return from_first(lambda: _solve(damped_gram(self.gram, damping), self.cross_FD, layer))


def _check_added_as_it_is(walk: Walk, index: int, reader: nn.Linear) -> None:
    """Raise ArchError if a norm stands between the reader's output and the hidden state that it is added to."""
    walk.hidden_BTD = [torch.zeros_like(hidden_BTD) for hidden_BTD in walk.hidden_BTD]

    def with_reader_giving(value: float) -> Tensor:
        def give(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.full_like(output, value)

        handle = reader.register_forward_hook(give)
        try:
            ((_, output_BTD),) = walk.run(index)
        finally:
            handle.remove()
        return output_BTD

    added_BTD = with_reader_giving(2.0) - with_reader_giving(0.0)
    if not torch.allclose(added_BTD, torch.full_like(added_BTD, 2.0), rtol=0.02):
        raise ArchError("depth: this family norms what an FFN gives, so a layer cannot be folded; remove it without.")


def _input_and_gain(
    walk: Walk, before: int, layer: int, reader: nn.Linear, hidden_BTD: Tensor
) -> tuple[Float[Tensor, "T F"], Float[Tensor, "T D"]]:
    """Return the reader's inputs in the layer `before`, and what `layer` adds to the hidden state, in float32.

    `hidden_BTD` enters the layer `before`; no stream moves.
    """
    seen: list[Tensor] = []
    handle = reader.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    try:
        between_BTD = walk.through(before, hidden_BTD)
    finally:
        handle.remove()
    added_BTD = walk.through(layer, between_BTD).float() - between_BTD.float()
    return seen[0].flatten(0, 1), added_BTD.flatten(0, 1)


def _solve(hessian_FF: Float[Tensor, "F F"], cross_FD: Float[Tensor, "F D"], layer: int) -> Float[Tensor, "F D"]:
    factor, failed = torch.linalg.cholesky_ex(hessian_FF)
    if failed:
        raise NumericsError(f"fold of layer {layer}: least squares has no solution; raise damping or use more tokens.")
    return torch.cholesky_solve(cross_FD.to(factor), factor).float()


def _judge(held_out: dict[str, list[tuple[Tensor, Tensor]]], change_DF: Float[Tensor, "D F"]) -> Guard:
    sums = {}
    for domain, parts in held_out.items():
        added_TD = torch.cat([added_TD for _, added_TD in parts])
        given_TD = torch.cat([x_TF.float() @ change_DF.T for x_TF, _ in parts])
        sums[domain] = held_out_sums(added_TD, given_TD, float(added_TD.square().sum()))
    return guard(held_out_errors(sums))
