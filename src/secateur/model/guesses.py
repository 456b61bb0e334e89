"""Guesses, from shapes alone, of what a layer can lose; and what it is to remove units, or to silence them.

In: a layer's linears or stacks of experts. Out: functions that make the `Group` of any layer of that
kind. Nothing here is proved: `structure` does that.
"""

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import ArchError
from secateur.model.group import (
    Axis,
    Experts,
    Group,
    Linears,
    Stacks,
    attribute_of,
    linear,
    rows_of,
)

FFN, SHARED, KV_HEADS, QUERY_HEADS = "ffn", "shared", "kv_heads", "query_heads"
EXPERTS, EXPERT_CHANNELS = "experts", "expert_ffn"
# Channels that fill 16 bytes in half precision, the alignment of transformers' grouped matmul.
CHANNEL_STEP = 8
# What a config calls the number of experts that a token is sent to.
KEYS_OF_CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k",
    "experts_per_token",
    "top_k_experts",
)

Build = Callable[[nn.Module, int, Any], Group]
"""Makes a group of a layer, its index and config; raises ArchError if the layer has no such modules."""


def channel_guesses(place: str, linears: dict[str, nn.Linear], name: str) -> Iterator[Build]:
    """Yield pairs of writers, H -> F or H -> 2 F, and a reader, F -> H."""
    for reader, down in linears.items():
        width, hidden = down.in_features, down.out_features
        sizes = {n: each.out_features for n, each in linears.items() if n != reader and each.in_features == hidden}
        plain = [n for n, size in sizes.items() if size == width]
        choices = (
            [tuple(plain)]
            if width != hidden
            else [c for k in (1, 2) for c in permutations(plain, k) if list(c) == sorted(c, key=plain.index)]
        )
        for writers in choices:
            if writers:
                yield _channels(place, dict.fromkeys(writers, (1,)), reader, name)
        for writer in (n for n, size in sizes.items() if size == 2 * width):
            yield _channels(place, {writer: (1, 1)}, reader, name)
            yield _channels(place, {writer: (2,)}, reader, name)


def _channels(place: str, writers: dict[str, tuple[int, ...]], reader: str, name: str) -> Build:
    def build(layer: nn.Module, index: int, config: Any) -> Group:
        axes = tuple(Axis(joined(place, writer), segments) for writer, segments in writers.items())
        return _of_linears(layer, index, name, "channel", axes, Axis(joined(place, reader), (1,)))

    return build


def _of_linears(
    layer: nn.Module,
    index: int,
    name: str,
    unit: str,
    writers: tuple[Axis, ...],
    reader: Axis,
    head_dim: int = 0,
) -> Group:
    whole = linear(layer, reader.module).weight
    num_units, num_params = whole.shape[1] // sum(reader.segments), whole.numel()
    for axis in writers:
        module = linear(layer, axis.module)
        if module.out_features != num_units * sum(axis.segments):
            raise ArchError(
                f"layer {index}, group {name}: {axis.module} has {module.out_features} rows for {num_units} units."
            )
        num_params += sum(each.numel() for each in module.parameters())
    return Group(
        layer=index,
        name=name,
        kind="heads" if head_dim else "channels",
        unit=unit,
        num_units=num_units,
        params_per_unit=num_params // num_units,
        parts=Linears(writers, reader),
        head_dim=head_dim,
    )


def stack_guesses(stacks: dict[str, Tensor], own: dict[str, Tensor], module: Any) -> Iterator[Stacks]:
    """Yield ways in which two stacks could be an expert's writer and reader."""
    for (writer, up), (down, reader) in permutations(stacks.items(), 2):
        biases = [name for name, each in own.items() if each.ndim == 2 and name.startswith(writer)]
        for transposed in (False, True):
            width, made = reader.shape[1 if transposed else 2], up.shape[2 if transposed else 1]
            if (
                made not in (width, 2 * width)
                or up.shape[1 if transposed else 2] != reader.shape[2 if transposed else 1]
            ):
                continue
            for alternating in (False, True) if made == 2 * width else (False,):
                yield Stacks(writer, next(iter(biases), None), down, alternating, transposed, gated=made == 2 * width)


def expert_channels_in(place: str, stacks: Stacks) -> Build:
    def build(layer: nn.Module, index: int, config: Any) -> Group:
        module = layer.get_submodule(place)
        axis = 1 if stacks.transposed else 2
        num_units = module.get_parameter(stacks.down).shape[axis]
        names = filter(None, (stacks.writer, stacks.writer_bias, stacks.down))
        return Group(
            layer=index,
            name=EXPERT_CHANNELS,
            kind="expert_channels",
            unit="channel of each expert",
            num_units=num_units,
            params_per_unit=sum(module.get_parameter(each).numel() for each in names) // num_units,
            at_least=1,
            multiple_of=CHANNEL_STEP,
            parts=Experts(place, stacks, unit_axis=axis),
        )

    return build


def experts_in(place: str, stacks: Stacks, rows: tuple[str, ...] = (), *, weighted: bool = False) -> Build:
    def build(layer: nn.Module, index: int, config: Any) -> Group:
        module = layer.get_submodule(place)
        num_units = len(module.get_parameter(stacks.down))
        tensors = {name: attribute_of(layer, name) for name in rows}
        num_groups = getattr(config, "n_group", None) or 1
        numbers = (getattr(config, key, None) for key in KEYS_OF_CHOSEN)
        # No expert goes where the config does not say how many a token is sent to.
        top_k = next((each for each in numbers if isinstance(each, int)), num_units)
        chosen = getattr(config, "topk_group", None) or 1
        held = [*module.parameters(), *(each for each in tensors.values() if isinstance(each, nn.Parameter))]
        return Group(
            layer=index,
            name=EXPERTS,
            kind="experts",
            unit="expert",
            num_units=num_units,
            params_per_unit=sum(each.numel() for each in held) // num_units,
            at_least=top_k if num_groups == 1 else num_groups * max(2, -(-top_k // chosen)),
            multiple_of=num_groups,
            parts=Experts(
                module=place,
                stacks=stacks,
                router_rows=rows,
                num_groups=num_groups,
                buffers=tuple(name for name, each in tensors.items() if not isinstance(each, nn.Parameter)),
                weighted_inputs=weighted,
            ),
        )

    return build


def head_guesses(place: str, linears: dict[str, nn.Linear], config: Any) -> Iterator[tuple[str, Build]]:
    """Yield KV heads, and query heads if they can be told from the others."""
    sizes = heads_of(config)
    if sizes is None:
        return
    queries, keys, width = sizes
    readers = [
        n
        for n, each in linears.items()
        if each.in_features == queries * width and each.out_features == config.hidden_size
    ]
    for reader in readers[-1:]:
        rows = {
            n: each.out_features
            for n, each in linears.items()
            if n != reader and each.in_features == config.hidden_size
        }
        own = [n for n, size in rows.items() if size == keys * width]
        asking = [n for n, size in rows.items() if size == queries * width]
        if queries == keys:
            asking = asking[:1]
            own = own[1:]
        if [n for n, size in rows.items() if size == (queries + 2 * keys) * width] == list(rows):
            yield KV_HEADS, _heads(place, KV_HEADS, list(rows), reader)
        elif len(asking) == 1 and len(own) == 2:
            yield KV_HEADS, _heads(place, KV_HEADS, asking + own, reader)
            yield QUERY_HEADS, _heads(place, QUERY_HEADS, asking, reader)


def _heads(place: str, name: str, writers: list[str], reader: str) -> Build:
    def build(layer: nn.Module, index: int, config: Any) -> Group:
        queries, keys, width = heads_of(config) or (0, 1, 0)

        def segments(num_rows: int) -> tuple[int, ...]:
            if name == QUERY_HEADS:  # one head of every KV head
                return (width,) * keys
            fused = (queries // keys * width, width, width)
            return fused if num_rows == keys * sum(fused) else (num_rows // keys,)

        axes = tuple(
            Axis(joined(place, made), segments(linear(layer, joined(place, made)).out_features)) for made in writers
        )
        unit = "KV head" if name == KV_HEADS else "query head per KV head"
        return _of_linears(
            layer, index, name, unit, axes, Axis(joined(place, reader), segments(queries * width)), width
        )

    return build


def heads_of(config: Any) -> tuple[int, int, int] | None:
    """Return query heads, KV heads and the width of a head, if the config says them."""
    queries, keys = (getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if not isinstance(queries, int) or not isinstance(keys, int) or queries % keys:
        return None
    return queries, keys, getattr(config, "head_dim", None) or config.hidden_size // queries


def mask(layer: nn.Module, group: Group, keep: Tensor) -> None:
    """Silence the units that do not stay: their reader columns are zero, or nothing is routed to them."""
    gone = _others(group, keep)
    with torch.no_grad():
        if group.kind == "expert_channels":
            stacks = group.experts.stacks
            down = layer.get_submodule(group.experts.module).get_parameter(stacks.down)
            down.index_fill_(group.experts.unit_axis, gone, 0.0)
        elif group.kind != "experts":
            weight = linear(layer, group.reader.module).weight
            weight[:, rows_of(gone, group.reader.segments, group.num_units)] = 0


def _others(group: Group, keep: Tensor) -> Tensor:
    return torch.tensor(sorted(set(range(group.num_units)) - set(keep.flatten().tolist())), dtype=torch.int64)


class Unrouted(TorchFunctionMode):
    """While it lasts, products with these router weights give minus infinity for these experts."""

    def __init__(self, routers: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.gone = {weight.data_ptr(): experts for weight, experts in routers}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and (gone := self.gone.get(args[1].data_ptr())) is not None:
            return output.index_fill(-1, gone, float("-inf"))
        return output


@torch.no_grad()
def close_to(layer: nn.Module, group: Group, keep: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Let the router's vectors turn down all experts but these; return its matrices and the others."""
    gone = _others(group, keep)
    rows = [attribute_of(layer, name) for name in group.experts.router_rows]
    for vector in (each for each in rows if each.numel() == max(each.shape) and each.is_floating_point()):
        vector.index_fill_(-1, gone, -1e9)
    return [(each, gone) for each in rows if each.numel() > max(each.shape)]


def some_of(group: Group) -> Tensor:
    """Return a random choice of about 60% of the units, as many as the group allows."""
    step = group.multiple_of
    count = max(group.at_least, step, min(group.num_units - step, round(0.6 * group.num_units / step) * step))
    return some_units(group, count)


def some_units(group: Group, count: int) -> Tensor:
    """Return a random choice of so many units, of experts as many in each of the router's groups."""
    parts = group.experts.num_groups if group.kind == "experts" else 1
    size, generator = group.num_units // parts, torch.Generator().manual_seed(0)
    orders = [number * size + torch.randperm(size, generator=generator)[: count // parts] for number in range(parts)]
    return torch.cat(orders).sort().values


def joined(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
