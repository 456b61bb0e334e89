"""A group bound to real modules: which rows and columns a unit owns, and the cut itself.

Only this module changes shapes. One rule covers all kinds: a tensor axis is a row of segments, and
in each segment unit i owns a fixed number of consecutive rows.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

Segments = tuple[int, ...]

GroupKey = tuple[int, str]  # (layer, group name)
# The original indices of the units that stay, sorted, by layer and group.
Keeps = dict[GroupKey, Tensor]
# How many of them.
Counts = dict[GroupKey, int]

Kind = Literal["channels", "heads", "experts", "expert_channels"]
"""What a unit is: an FFN channel, a head, an expert, or one channel of every expert of a layer."""
OF_EXPERTS: frozenset[Kind] = frozenset({"experts", "expert_channels"})
# What transformers' experts call their stack of readers.
DOWN = "down_proj"
ALIGNED: frozenset[Kind] = frozenset({"channels", "expert_channels"})
"""Kinds whose counts are multiples of the recipe's `align`."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor, dotted from the layer, and the axis of it on which the units' rows are.

    `segments[k]` consecutive rows belong to a unit in segment k.
    """

    name: str
    axis: int
    segments: Segments

    @property
    def module(self) -> str:
        """The module that has the tensor."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Stacks:
    """How experts' matrices are stored: `writer` makes gate and up, or up alone; DOWN reads them.

    Experts are on axis 0. `segments`: a channel's rows of the writer: of gate and of up in two
    halves, both adjacent, or of up alone. `transposed`: a matrix is inputs x outputs.
    """

    writer: str
    segments: Segments
    transposed: bool


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of one layer: the module that has their matrices, and how it stores them."""

    module: Any
    stacks: Stacks

    @property
    def readers(self) -> Tensor:
        """The stack of readers, E x D x F, to be changed in place."""
        stored = self.module.get_parameter(DOWN)
        return stored.mT if self.stacks.transposed else stored

    @property
    def num_channels(self) -> int:
        """The number of channels of every expert."""
        return self.readers.shape[-1]

    def reader(self, expert: int) -> Float[Tensor, "D F"]:
        """Return one expert's reader in float32."""
        return self.readers[expert].float()

    def inputs(self, expert: int, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T F"]:
        """Return the inputs of the expert's reader: act(up), or what transformers' experts make of
        gate and up.
        """
        module, stacks = self.module, self.stacks
        writer = module.get_parameter(stacks.writer)[expert]
        both = hidden_TD @ (writer if stacks.transposed else writer.T)
        if (bias := getattr(module, f"{stacks.writer}_bias", None)) is not None:
            both = both + bias[expert]
        return module.act_fn(both) if stacks.segments == (1,) else module._apply_gate(both)


@dataclass(frozen=True, slots=True)
class Linears:
    """Where channels or heads are: rows of every writer's weight, columns of the reader's."""

    writers: tuple[Rows, ...]
    reader: Rows

    def rows(self, layer: nn.Module) -> list[Rows]:
        """Return what the units consist of, once each."""
        made = [
            Rows(f"{writer.module}.{name}", 0, writer.segments)
            for writer in self.writers
            for name, _ in linear(layer, writer.module).named_parameters()
        ]
        return [*made, self.reader]


@dataclass(frozen=True, slots=True)
class Experts:
    """Modules and numbers of one layer's experts.

    `reader`: the stack of readers, with experts on axis 0. `router_rows`: tensors of the layer with
    a row for each expert. `num_groups`: experts form this many groups of equal size, which the
    router chooses first. `weighted_inputs`: every expert gets all tokens, weighted.
    """

    reader: Rows
    stacks: Stacks
    router_rows: tuple[str, ...] = ()
    num_groups: int = 1
    weighted_inputs: bool = False

    def of(self, layer: nn.Module) -> Mixture:
        """Return the experts that the layer has."""
        return Mixture(layer.get_submodule(self.reader.module), self.stacks)

    def rows(self, layer: nn.Module) -> list[Rows]:
        """Return what the units consist of, once each."""
        stacks, module = self.stacks, self.reader.module
        own = {
            f"{module}.{name}": tensor
            for name, tensor in layer.get_submodule(module).named_parameters()
        }
        if self.reader.axis:
            made = [
                Rows(name, tensor.ndim - 1 if stacks.transposed else 1, stacks.segments)
                for name, tensor in own.items()
                if name.startswith(f"{module}.{stacks.writer}")
            ]
            return [*made, self.reader]
        rows = {name: attribute_of(layer, name).shape for name in (*own, *self.router_rows)}
        return [
            Rows(name, len(shape) - 1 if shape[0] == 1 else 0, (1,)) for name, shape in rows.items()
        ]


@dataclass(frozen=True, slots=True)
class Group:
    """One layer's group. `params_per_unit` counts weights and biases of writers and reader.

    `parts`: the modules that hold the units; `kind` decides the type. `config_key`: the config key
    of the number of units. `head_dim`: 0 but for heads. `per_key`: units to one of that key, if the
    switches of `settings` stand so. `counts`: attributes of modules, dotted from the layer, that
    hold the number of units, or a config that says it. `divides`: (factor, whole) if the config
    class requires that count * factor divides `whole`. `at_least`, `multiple_of`: limits on counts
    for the model to run.
    """

    name: str
    kind: Kind
    unit: str
    parts: Linears | Experts
    layer: int = 0
    num_units: int = 0
    params_per_unit: int = 0
    counts: tuple[str, ...] = ()
    divides: tuple[int, int] | None = None
    config_key: str = ""
    per_key: float = 1.0
    settings: tuple[tuple[str, bool], ...] = ()
    head_dim: int = 0
    at_least: int = 0
    multiple_of: int = 1

    @property
    def writers(self) -> tuple[Rows, ...]:
        """The linears that write the units; only for channels and heads."""
        assert isinstance(self.parts, Linears)
        return self.parts.writers

    @property
    def reader(self) -> Rows:
        """The tensor that reads the units."""
        return self.parts.reader

    @property
    def experts(self) -> Experts:
        """The layer's experts; only for experts and their channels."""
        assert isinstance(self.parts, Experts)
        return self.parts

    @property
    def key(self) -> GroupKey:
        """Its layer and name."""
        return self.layer, self.name

    @property
    def num_inputs(self) -> int:
        """Inputs of the reader in the joint least squares of all units; 0 for experts."""
        return self.num_units * self.width

    @property
    def width(self) -> int:
        """Reader columns of one unit; 0 for an expert, which has its own reader."""
        return 0 if self.kind == "experts" else sum(self.reader.segments)

    def num_units_left(self, layer: nn.Module) -> int:
        """Return how many units the layer has now."""
        reader = self.reader
        return attribute_of(layer, reader.name).shape[reader.axis] // sum(reader.segments)

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return the layer's tensors that the units consist of, by name."""
        return {part.name: attribute_of(layer, part.name) for part in self.parts.rows(layer)}

    def refitted(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return what compensation changes: the tensor that reads the units."""
        name = self.reader.name
        return {name: attribute_of(layer, name)}

    def allows(self, num_units: int) -> bool:
        """Say whether the family's config can state that many units."""
        if num_units < self.at_least or num_units % self.multiple_of:
            return False
        return self.divides is None or self.divides[1] % (num_units * self.divides[0]) == 0


# Of several layers, and of several names.
Groups = tuple[Group, ...]


def by_name(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """Return the groups of each name, in order."""
    named = dict[str, list[Group]]()
    for group in groups:
        named.setdefault(group.name, []).append(group)
    return named


def linear(layer: nn.Module, name: str) -> nn.Linear:
    """Return the layer's linear of that name."""
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def attribute_of(layer: nn.Module, name: str) -> Any:
    """Return the tensor or attribute of that name, dotted from the layer."""
    return attrgetter(name)(layer)


def rows_of(
    keep: Int64[Tensor, "*E K"], segments: Segments, num_units: int
) -> Int64[Tensor, "*E R"]:
    """Return the rows of the units `keep`, segment by segment.

    Segment k starts after the previous ones and gives unit i the rows from `i * segments[k]` on.
    """
    return torch.cat([rows.flatten(-2) for rows in _rows(keep, segments, num_units)], dim=-1)


def unit_columns(segments: Segments, num_units: int, device: torch.device) -> Int64[Tensor, "U w"]:
    """Return each unit's rows (for a reader: columns), one row of the result per unit."""
    return torch.cat(_rows(torch.arange(num_units, device=device), segments, num_units), dim=1)


def _rows(
    units: Int64[Tensor, "*E U"], segments: Segments, num_units: int
) -> list[Int64[Tensor, "*E U w"]]:
    starts = (num_units * width for width in accumulate(segments, initial=0))
    widths = zip(starts, segments, strict=False)
    return [
        start + units[..., None] * width + torch.arange(width, device=units.device)
        for start, width in widths
    ]


def original_units(
    before: Int64[Tensor, "... B"], keep: Int64[Tensor, "*E K"]
) -> Int64[Tensor, "*E K"]:
    """Return original unit indices: `before` are those still there, `keep` indexes into `before`.

    For experts' channels both have one row per expert, or `before` has one for all.
    """
    return before.expand(*keep.shape[:-1], before.shape[-1]).gather(-1, keep)


@torch.no_grad()
def cut(
    layer: nn.Module,
    group: Group,
    keep: Int64[Tensor, "*E K"],
    reader_weight: Float[Tensor, "H R"] | None = None,
) -> None:
    """Keep only the units `keep`, sorted indices of those that the layer has now.

    Of channels inside experts every expert may keep its own, a row each. `reader_weight`, of
    channels and heads, replaces the reader's remaining columns (compensation); without it they are
    unchanged, bit for bit.
    """
    num_units = group.num_units_left(layer)
    for rows in group.parts.rows(layer):
        old = attribute_of(layer, rows.name)
        index = rows_of(keep, rows.segments, num_units)
        # Behind those of its experts a router may have rows of shared ones, which stay.
        behind = torch.arange(
            num_units * sum(rows.segments), old.shape[rows.axis], device=keep.device
        )
        index = torch.cat([index, behind.expand(*index.shape[:-1], -1)], dim=-1)
        put(layer, rows.name, _taken(old, index.to(old.device), rows.axis))
    if reader_weight is not None:
        name = group.reader.name
        put(layer, name, reader_weight.to(attribute_of(layer, name)))
    for name in group.counts:
        count: Any = keep.shape[-1]
        if name.endswith(".config"):  # becomes the module's own
            count = copy.copy(attribute_of(layer, name))
            setattr(count, group.config_key, keep.shape[-1])
            count.num_attention_heads = (
                linear(layer, group.reader.module).in_features // group.head_dim
            )
        put(layer, name, count)


def _taken(old: Tensor, index: Int64[Tensor, "*E R"], axis: int) -> Tensor:
    if index.ndim == 1:
        return old.index_select(axis, index)
    return torch.stack([_taken(*pair, axis - 1) for pair in zip(old, index, strict=True)])


def put(layer: nn.Module, name: str, value: Any) -> None:
    """Set the layer's parameter or attribute of that name; the sizes of a linear are those of its
    weight.
    """
    place, _, attribute = name.rpartition(".")
    module: Any = layer.get_submodule(place)
    old = getattr(module, attribute)
    if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    setattr(module, attribute, value)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
