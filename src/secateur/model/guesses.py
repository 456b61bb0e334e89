"""Guesses, from shapes alone, of what a layer can lose; and what it is to remove units, or to
silence them.

In: a layer's linears or stacks of experts. Out: a `Group` that has no numbers yet; `sized` gives it
those of any layer of that kind. Nothing here is proved: `bind` does that.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.model.group import (
    DOWN,
    Experts,
    Group,
    Linears,
    Rows,
    Stacks,
    attribute_of,
    rows_of,
)
from secateur.model.stock import head_width

FFN, SHARED, KV_HEADS, QUERY_HEADS = "ffn", "shared", "kv_heads", "query_heads"
EXPERTS, EXPERT_CHANNELS = "experts", "expert_ffn"
# Channels that fill 16 bytes in half precision, the alignment of transformers' grouped matmul.
CHANNEL_STEP = 8


def channel_guesses(linears: dict[str, nn.Linear], name: str) -> Iterator[Group]:
    """Yield pairs of writers, H -> F or H -> 2 F, and a reader, F -> H."""
    for reader, down in linears.items():
        width, hidden = down.in_features, down.out_features
        sizes = {
            n: module.out_features
            for n, module in linears.items()
            if n != reader and module.in_features == hidden
        }
        plain = [n for n, size in sizes.items() if size == width]
        for writers in chain(combinations(plain, 1), combinations(plain, 2)):
            yield _channels(dict.fromkeys(writers, (1,)), reader, name)
        for writer in (n for n, size in sizes.items() if size == 2 * width):
            yield _channels({writer: (1, 1)}, reader, name)
            yield _channels({writer: (2,)}, reader, name)


def _channels(writers: dict[str, tuple[int, ...]], reader: str, name: str) -> Group:
    made = tuple(Rows(f"{writer}.weight", 0, segments) for writer, segments in writers.items())
    read = Rows(f"{reader}.weight", 1, (1,))
    return Group(name, "channels", "channel", Linears(made, read))


def sized(group: Group, layer: nn.Module, index: int, config: Any) -> Group:
    """Return the group with the numbers of this layer.

    Raises what torch raises if there are no modules of these names.
    """
    if group.kind == "heads":
        group = _by_heads(group, layer, config)
    elif group.kind == "experts":
        group = _by_router(group, config)
    num_units = group.num_units_left(layer)
    parameters = (
        each.numel() for each in group.tensors(layer).values() if isinstance(each, nn.Parameter)
    )
    return replace(
        group,
        layer=index,
        num_units=num_units,
        params_per_unit=sum(parameters) // num_units,
        multiple_of=max(group.multiple_of, int(group.per_key)),
        divides=(config.num_attention_heads // num_units, config.hidden_size)
        if group.divides
        else None,
    )


def _by_heads(group: Group, layer: nn.Module, config: Any) -> Group:
    """Return the group with the segments of a unit, a KV head or one query head of each, and with
    the width of a head.
    """
    queries, keys, width = heads_of(config) or (0, 1, 0)

    def by_heads(rows: Rows) -> Rows:
        if group.name == QUERY_HEADS:
            return replace(rows, segments=(width,) * keys)
        num_rows = attribute_of(layer, rows.name).shape[rows.axis]
        fused = (queries // keys * width, width, width)
        return replace(
            rows, segments=fused if num_rows == keys * sum(fused) else (num_rows // keys,)
        )

    parts = Linears(tuple(map(by_heads, group.writers)), by_heads(group.reader))
    return replace(group, parts=parts, head_dim=width)


def _by_router(group: Group, config: Any) -> Group:
    """Return the group with the router's groups of experts, each with as many as the router needs.

    `group.at_least`: to how many experts a token is sent.
    """
    num_groups, chosen = (getattr(config, key, None) or 1 for key in ("n_group", "topk_group"))
    if num_groups == 1:
        return group
    return replace(
        group,
        parts=replace(group.experts, num_groups=num_groups),
        at_least=num_groups * max(2, -(-group.at_least // chosen)),
        multiple_of=num_groups,
    )


def stacks_of(experts: Any, *, transposed: bool) -> Stacks:
    """Return how a module's experts are stored, as transformers' interface of experts says it.

    `transposed`: of modules that do not follow it.
    """
    transposed = getattr(experts, "is_transposed", transposed)
    if not hasattr(experts, "gate_up_proj"):
        return Stacks("up_proj", (1,), transposed)
    segments = (1, 1) if getattr(experts, "is_concatenated", True) else (2,)
    return Stacks("gate_up_proj", segments, transposed)


def expert_channels_in(place: str, stacks: Stacks) -> Group:
    """Return the channels of every expert of the module at `place`."""
    parts = Experts(Rows(f"{place}.{DOWN}", 1 if stacks.transposed else 2, (1,)), stacks)
    return Group(
        EXPERT_CHANNELS,
        "expert_channels",
        "channel of each expert",
        parts,
        at_least=1,
        multiple_of=CHANNEL_STEP,
    )


def head_guesses(linears: dict[str, nn.Linear], config: Any) -> Iterator[Group]:
    """Yield KV heads, and query heads if they can be told from the others."""
    sizes = heads_of(config)
    if sizes is None:
        return
    queries, keys, width = sizes
    readers = [
        n
        for n, module in linears.items()
        if module.in_features == queries * width and module.out_features == config.hidden_size
    ]
    for reader in readers[-1:]:
        rows = {
            n: module.out_features
            for n, module in linears.items()
            if n != reader and module.in_features == config.hidden_size
        }
        made = [queries * width, keys * width, keys * width]
        writers = sorted(
            (n for n in rows if rows[n] in made), key=lambda n: -rows[n]
        )  # that of queries first
        if set(rows.values()) == {sum(made)}:
            yield _heads(KV_HEADS, list(rows), reader)
        elif [rows[n] for n in writers] == made:
            yield _heads(KV_HEADS, writers, reader)
            yield _heads(QUERY_HEADS, writers[:1], reader)


def _heads(name: str, writers: list[str], reader: str) -> Group:
    """Return the group; `sized` says which rows a head has."""
    unit = "KV head" if name == KV_HEADS else "query head per KV head"
    return replace(_channels(dict.fromkeys(writers, ()), reader, name), kind="heads", unit=unit)


def heads_of(config: Any) -> tuple[int, int, int] | None:
    """Return query heads, KV heads and the width of a head, if the config says them."""
    queries, keys = (
        getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")
    )
    if not isinstance(queries, int) or not isinstance(keys, int) or queries % keys:
        return None
    return queries, keys, head_width(config)


class Unrouted(TorchFunctionMode):
    """While it lasts, products with these router weights give minus infinity for these experts."""

    def __init__(self, routers: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.gone = {weight.data_ptr(): experts for weight, experts in routers}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if (
            func is torch.nn.functional.linear
            and (gone := self.gone.get(args[1].data_ptr())) is not None
        ):
            return output.index_fill(-1, gone, float("-inf"))
        return output


@torch.no_grad()
def silence(layer: nn.Module, group: Group, keep: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Silence the units that do not stay; return, for `Unrouted`, the router's matrices and the
    experts of these.

    What reads channels or heads becomes zero. The router's vectors turn down all other experts.
    """
    others = torch.tensor(
        sorted(set(range(group.num_units)) - set(keep.flatten().tolist())), dtype=torch.int64
    )
    if group.kind != "experts":
        reader = group.reader
        rows = rows_of(others, reader.segments, group.num_units)
        attribute_of(layer, reader.name).index_fill_(reader.axis, rows, 0.0)
        return []
    router = [attribute_of(layer, name) for name in group.experts.router_rows]
    for vector in (
        row for row in router if row.numel() == max(row.shape) and row.is_floating_point()
    ):
        vector.index_fill_(-1, others, -1e9)
    return [(matrix, others) for matrix in router if matrix.numel() > max(matrix.shape)]


def some_of(group: Group) -> Tensor:
    """Return a random choice of about 60% of the units, as many as the group allows."""
    step = group.multiple_of
    count = max(
        group.at_least,
        step,
        min(group.num_units - step, round(0.6 * group.num_units / step) * step),
    )
    return some_units(group, count)


def some_units(group: Group, count: int) -> Tensor:
    """Return a random choice of so many units, of experts as many in each of the router's
    groups.
    """
    parts = group.experts.num_groups if group.kind == "experts" else 1
    size, generator = group.num_units // parts, torch.Generator().manual_seed(0)
    orders = [
        number * size + torch.randperm(size, generator=generator)[: count // parts]
        for number in range(parts)
    ]
    return torch.cat(orders).sort().values
