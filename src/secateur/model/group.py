"""A group bound to real modules: which rows and columns a unit owns, and the cut itself.

Only this module changes shapes. One rule covers all kinds: a tensor axis is a row of segments, and
in each segment unit i owns a fixed number of consecutive rows.
"""

import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

Segments = tuple[int, ...]

GroupKey = tuple[int, str]  # (layer, group name)

Kind = Literal["channels", "heads", "experts", "expert_channels"]
"""What a unit is: an FFN channel, a head, an expert, or one channel of every expert of a layer."""
OF_EXPERTS: frozenset[Kind] = frozenset({"experts", "expert_channels"})
ALIGNED: frozenset[Kind] = frozenset({"channels", "expert_channels"})
"""Kinds whose counts are multiples of the recipe's `align`."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The units' axis of one linear: `segments[k]` consecutive rows per unit in segment k."""

    module: str
    segments: Segments


@dataclass(frozen=True, slots=True)
class Stacks:
    """How experts' matrices are stored: `writer` makes gate and up, `down` reads them.

    Experts are on axis 0. `alternating`: a channel's rows of gate and up are adjacent, not in two
    halves. `transposed`: a matrix is inputs x outputs. `gated`: `writer` makes gate and up; else up alone.
    """

    writer: str
    writer_bias: str | None
    down: str
    alternating: bool
    transposed: bool
    gated: bool = True


@dataclass(frozen=True, slots=True)
class Linears:
    """Where channels or heads are: rows of every writer, columns of the reader."""

    writers: tuple[Axis, ...]
    reader: Axis
    buffers: ClassVar[tuple[str, ...]] = ()

    @property
    def module(self) -> str:
        """The module that contains the units."""
        return self.reader.module

    @property
    def width(self) -> int:
        """Reader columns of one unit."""
        return sum(self.reader.segments)

    def num_units_left(self, layer: nn.Module) -> int:
        """Return how many units the layer has now."""
        return linear(layer, self.reader.module).in_features // self.width

    def parameters(self, layer: nn.Module) -> list[nn.Parameter]:
        """Return what the units consist of, once each."""
        writers = (linear(layer, axis.module) for axis in self.writers)
        reader = linear(layer, self.reader.module).get_parameter("weight")
        return [reader, *(parameter for writer in writers for parameter in writer.parameters())]

    def refitted(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """Return what compensation changes: the reader's weight."""
        return {"weight": linear(layer, self.reader.module).get_parameter("weight")}


@dataclass(frozen=True, slots=True)
class Experts:
    """Modules and numbers of one layer's experts.

    `router_rows`: tensors of the layer with a row for each expert. `num_groups`: experts form this many
    groups of equal size, which the router chooses first. `buffers`: the `router_rows` that are no parameters.
    `unit_axis`: the units' axis of the stack
    of readers; 0 for experts. `weighted_inputs`: every expert gets all tokens, weighted.
    """

    module: str
    stacks: Stacks
    router_rows: tuple[str, ...] = ()
    num_groups: int = 1
    buffers: tuple[str, ...] = ()
    unit_axis: int = 0
    weighted_inputs: bool = False

    @property
    def width(self) -> int:
        """Reader columns of one unit; 0 for an expert, which has its own reader."""
        return int(self.unit_axis > 0)

    def num_units_left(self, layer: nn.Module) -> int:
        """Return how many units the layer has now."""
        return layer.get_submodule(self.module).get_parameter(self.stacks.down).shape[self.unit_axis]

    def parameters(self, layer: nn.Module) -> list[nn.Parameter]:
        """Return what the units consist of, once each."""
        module = layer.get_submodule(self.module)
        if self.unit_axis:
            names = filter(None, (self.stacks.writer, self.stacks.writer_bias, self.stacks.down))
            return [module.get_parameter(name) for name in names]
        rows = (attribute_of(layer, name) for name in self.router_rows)
        return [*module.parameters(), *(row for row in rows if isinstance(row, nn.Parameter))]

    def refitted(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """Return what compensation changes: the stack of readers."""
        name = f"{self.module}.{self.stacks.down}"
        return {name: layer.get_parameter(name)}


@dataclass(frozen=True, slots=True)
class Group:
    """One layer's group. `params_per_unit` counts weights and biases of writers and reader.

    `parts`: the modules that hold the units; `kind` decides the type.
    `config_key`: the config key of the number of units. `head_dim`: 0 but for heads.
    `per_key`: units to one of that key, if the switches of `settings` stand so. `counts`: attributes of
    modules, dotted from the layer, that hold the number of units, or a config that says it.
    `divides`: (factor, whole) if the config class requires that count * factor divides `whole`.
    `at_least`, `multiple_of`: limits on counts for the model to run. `adds_directly`: what the module
    gives is added to the stream as it is.
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
    adds_directly: bool = True

    @property
    def writers(self) -> tuple[Axis, ...]:
        """The linears that write the units; only for channels and heads."""
        assert isinstance(self.parts, Linears)
        return self.parts.writers

    @property
    def reader(self) -> Axis:
        """The linear that reads the units; only for channels and heads."""
        assert isinstance(self.parts, Linears)
        return self.parts.reader

    @property
    def experts(self) -> Experts:
        """The layer's experts; only for experts and their channels."""
        assert isinstance(self.parts, Experts)
        return self.parts

    @property
    def attributes(self) -> tuple[str, ...]:
        """What a cut sets besides parameters, dotted from the layer."""
        return (*self.counts, *self.parts.buffers)

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
        """Reader columns of one unit."""
        return self.parts.width

    def allows(self, num_units: int) -> bool:
        """Say whether the family's config can state that many units."""
        if num_units < self.at_least or num_units % self.multiple_of:
            return False
        return self.divides is None or self.divides[1] % (num_units * self.divides[0]) == 0


def linear(layer: nn.Module, name: str) -> nn.Linear:
    """Return the layer's linear of that name."""
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def attribute_of(layer: nn.Module, name: str) -> Any:
    """Return the tensor or attribute of that name, dotted from the layer."""
    module, _, attribute = name.rpartition(".")
    return getattr(layer.get_submodule(module), attribute)


def rows_of(keep: Int64[Tensor, " K"], segments: Segments, num_units: int) -> Int64[Tensor, " R"]:
    """Return the rows of the units `keep`, segment by segment.

    Segment k starts after the previous ones and gives unit i the rows from `i * segments[k]` on.
    """
    return torch.cat([rows.flatten() for rows in _rows(keep, segments, num_units)])


def unit_columns(segments: Segments, num_units: int, device: torch.device) -> Int64[Tensor, "U w"]:
    """Return each unit's rows (for a reader: columns), one row of the result per unit."""
    return torch.cat(_rows(torch.arange(num_units, device=device), segments, num_units), dim=1)


def _rows(units: Int64[Tensor, " U"], segments: Segments, num_units: int) -> list[Int64[Tensor, "U w"]]:
    starts = (num_units * width for width in accumulate(segments, initial=0))
    widths = zip(starts, segments, strict=False)
    return [start + units[:, None] * width + torch.arange(width, device=units.device) for start, width in widths]


def original_units(before: Int64[Tensor, "... B"], keep: Int64[Tensor, "*E K"]) -> Int64[Tensor, "*E K"]:
    """Return original unit indices: `before` are those still there, `keep` indexes into `before`.

    For experts' channels both have one row per expert, or `before` has one for all.
    """
    return before.expand(*keep.shape[:-1], before.shape[-1]).gather(-1, keep)


@torch.no_grad()
def cut(
    layer: nn.Module, group: Group, keep: Int64[Tensor, "*E K"], reader_weight: Float[Tensor, "H R"] | None = None
) -> None:
    """Keep only the units `keep`, sorted indices of those that the layer has now.

    Of channels inside experts every expert may keep its own, a row each. `reader_weight`, of channels
    and heads, replaces the reader's remaining columns (compensation); without it they are unchanged, bit
    for bit.
    """
    if group.kind == "experts":
        _cut_experts(layer, group, keep)
    elif group.kind == "expert_channels":
        _cut_expert_channels(layer, group, keep)
    else:
        _cut_linears(layer, group, keep, reader_weight)


def _cut_linears(layer: nn.Module, group: Group, keep: Tensor, reader_weight: Tensor | None) -> None:
    num_units = group.parts.num_units_left(layer)
    for axis in group.writers:
        _cut_rows(linear(layer, axis.module), rows_of(keep, axis.segments, num_units))
    reader = linear(layer, group.reader.module)
    columns = rows_of(keep, group.reader.segments, num_units)
    kept = reader.weight[:, columns] if reader_weight is None else reader_weight.to(reader.weight)
    reader.weight = _parameter(kept, reader.weight)
    reader.in_features = len(columns)
    _set_counts(layer, group, len(keep))


def _set_counts(layer: nn.Module, group: Group, count: int) -> None:
    """Set the attributes of the layer's modules that hold the number of units; a config becomes the module's own."""
    for name in group.counts:
        place, _, attribute = name.rpartition(".")
        module: Any = layer.get_submodule(place)
        if attribute == "config":
            module.config = copy.copy(module.config)
            setattr(module.config, group.config_key, count)
            module.config.num_attention_heads = linear(layer, group.reader.module).in_features // group.head_dim
        else:
            setattr(module, attribute, count)


def _cut_rows(module: nn.Linear, rows: Int64[Tensor, " R"]) -> None:
    module.weight = _parameter(module.weight[rows], module.weight)
    if module.bias is not None:
        module.bias = _parameter(module.bias[rows], module.bias)
    module.out_features = len(rows)


def _parameter(value: Tensor, old: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)


def num_channels(module: nn.Module, stacks: Stacks) -> int:
    """Return the number of channels of every expert."""
    return module.get_parameter(stacks.down).shape[1 if stacks.transposed else 2]


def reader_of(module: nn.Module, stacks: Stacks, expert: int) -> Float[Tensor, "D F"]:
    """Return one expert's reader in float32."""
    weight = module.get_parameter(stacks.down)[expert]
    return (weight.T if stacks.transposed else weight).float()


def channel_inputs(module: Any, stacks: Stacks, expert: int, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T F"]:
    """Return the inputs of the expert's reader: act(gate) * up, act(up), or the family's own gate."""
    writer = module.get_parameter(stacks.writer)[expert]
    both = hidden_TD @ (writer if stacks.transposed else writer.T)
    if stacks.writer_bias is not None:
        both = both + module.get_parameter(stacks.writer_bias)[expert]
    if not stacks.gated:
        return module.act_fn(both)
    if stacks.alternating or hasattr(module, "_apply_gate"):
        return module._apply_gate(both)
    gate, up = both.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def _cut_experts(layer: nn.Module, group: Group, keep: Int64[Tensor, " K"]) -> None:
    """Keep these experts: their entries of every stack, their router rows, and the counts.

    Rows behind those of the experts, of shared ones, stay.
    """
    experts, before = group.experts, group.parts.num_units_left(layer)
    names = [f"{experts.module}.{name}" for name, _ in layer.get_submodule(experts.module).named_parameters()]
    for name in (*names, *experts.router_rows):
        tensor, (parent, _, attribute) = attribute_of(layer, name), name.rpartition(".")
        axis = -1 if len(tensor) == 1 else 0
        rows = torch.cat([keep.to(tensor.device), torch.arange(before, tensor.shape[axis], device=tensor.device)])
        kept = tensor.index_select(axis, rows).contiguous()
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(layer.get_submodule(parent), attribute, _parameter(kept, tensor) if is_parameter else kept)
    _set_counts(layer, group, len(keep))


def _cut_expert_channels(layer: nn.Module, group: Group, keep: Int64[Tensor, "*E K"]) -> None:
    """Keep these channels of each expert: rows of the writers, columns of the readers."""
    stacks, module = group.experts.stacks, layer.get_submodule(group.experts.module)
    keep_EK = keep.expand(len(module.get_parameter(stacks.down)), -1)
    rows = keep_EK.unsqueeze(-1) * 2 + torch.arange(2, device=keep_EK.device)
    halves = torch.cat([keep_EK, keep_EK + num_channels(module, stacks)], dim=1) if stacks.gated else keep_EK
    rows_ER = rows.flatten(1) if stacks.alternating else halves
    _take(module, stacks.writer, rows_ER, 2 if stacks.transposed else 1)
    if stacks.writer_bias is not None:
        _take(module, stacks.writer_bias, rows_ER, 1)
    _take(module, stacks.down, keep_EK, 1 if stacks.transposed else 2)


def _take(module: nn.Module, name: str, index_EK: Tensor, axis: int) -> None:
    old = module.get_parameter(name)
    shape = [1] * old.ndim
    shape[0], shape[axis] = index_EK.shape
    kept = torch.take_along_dim(old.data, index_EK.to(old.device).view(shape), dim=axis)
    setattr(module, name, _parameter(kept, old))
