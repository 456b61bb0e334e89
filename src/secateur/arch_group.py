"""A group bound to real modules: which rows and columns go when a unit goes.

A tensor axis is a row of segments; in each segment unit i owns `w` consecutive rows.
"""

from dataclasses import dataclass

from torch import nn

from secateur.arch_numbers import Segments
from secateur.errors import ArchError, nearest

# Channels of experts that fill 16 bytes in half precision.
CHANNEL_STEP = 8


@dataclass(frozen=True, slots=True)
class Axis:
    """The units' axis of one linear: `segments[k]` consecutive rows per unit in segment k."""

    module: str
    segments: Segments


@dataclass(frozen=True, slots=True)
class BiasSwitch:
    """The config key that makes the reader's bias storable, and the linears that it gives a bias."""

    config_key: str
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stacks:
    """How the matrices of experts are stored: `writer` makes gate and up, `down` reads them, experts on axis 0.

    `alternating`: a channel's rows of gate and up lie side by side, not in two halves. `transposed`: stacks are inputs
    x outputs.
    """

    writer: str
    writer_bias: str | None
    down: str
    alternating: bool
    transposed: bool


@dataclass(frozen=True, slots=True)
class Experts:
    """Modules and numbers of one layer's experts, see `arch_spec.ExpertsSpec`.

    `at_least`: what the router needs to choose from. `num_groups`: experts lie in that many groups of equal size, which
    the router chooses first. `buffers`: those of `router_rows` that are no parameters. `stacks`: how their matrices
    lie. `are_channels`: the units are channels of every expert and not experts. `weighted_inputs`: every expert gets
    all tokens, times its weight, which is zero for most.
    """

    module: str
    router: str
    router_rows: tuple[str, ...]
    counts: tuple[str, ...]
    at_least: int
    num_groups: int
    buffers: tuple[str, ...]
    stacks: Stacks
    are_channels: bool = False
    weighted_inputs: bool = False

    @property
    def multiple_of(self) -> int:
        """Step of the counts that stay: transformers multiplies experts in groups, in rows of 16 bytes."""
        return CHANNEL_STEP if self.are_channels else self.num_groups

    @property
    def attributes(self) -> tuple[str, ...]:
        """What a cut sets besides parameters, dotted from the layer."""
        return (*self.counts, *self.buffers)


@dataclass(frozen=True, slots=True)
class Group:
    """One layer's group, bound to real modules. `params_per_unit` counts weights and biases of writers and reader.

    `config_key`: where the config holds the number of units, the first of several. `head_dim`: of units that are heads.
    `count`: the module attribute, dotted from the layer, that holds the number of units; None where none does.
    `local_config`: the module whose config a cut layer needs to itself.
    `divides`: (factor, whole) where the config class takes only counts whose `factor` fold divides `whole`.
    `experts`: of units that are experts, which have no writers; the reader then is the module that holds them.
    """

    layer: int
    name: str
    unit: str
    num_units: int
    params_per_unit: int
    writers: tuple[Axis, ...]
    reader: Axis
    count: str | None
    bias_switch: BiasSwitch | None
    divides: tuple[int, int] | None = None
    config_key: str = ""
    head_dim: int | None = None
    local_config: str | None = None
    experts: "Experts | None" = None

    @property
    def attributes(self) -> tuple[str, ...]:
        """What a cut sets besides tensors: attributes, dotted from the layer."""
        config = () if self.local_config is None else (f"{self.local_config}.config",)
        count = () if self.count is None else (self.count,)
        return (*count, *config, *(self.experts.attributes if self.experts else ()))

    @property
    def num_inputs(self) -> int:
        """Reader inputs that least squares is solved over; experts are not refitted."""
        return 0 if self.experts and not self.experts.are_channels else self.num_units * self.width

    def allows(self, num_units: int) -> bool:
        """Say whether the family's config can state that many units."""
        if self.experts and (num_units < self.experts.at_least or num_units % self.experts.multiple_of):
            return False
        return self.divides is None or self.divides[1] % (num_units * self.divides[0]) == 0

    @property
    def width(self) -> int:
        """Reader columns of one unit."""
        return sum(self.reader.segments)


def submodule(parent: nn.Module, name: str, family: str) -> nn.Module:
    """Return the module of that name. Raises ArchError naming the nearest one if there is none."""
    names = {child: module for child, module in parent.named_modules() if child}
    if name not in names:
        raise ArchError(
            f"family {family}: the spec names module '{name}', which this {type(parent).__name__} does not have; "
            f"did you mean '{nearest(name, names)}'?"
        )
    return names[name]
