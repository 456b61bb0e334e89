"""The record of `secateur inspect`: a model's structure, and what a recipe would leave of it and cost."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from secateur.facts import Outcome, Size
from secateur.json_file import Record
from secateur.recipe import MeasuredPrices


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by part; `statistics` and `solve` are of the widest group. Weights in their files are none: page cache.

    `layer_choice`: what is there, beside the weights, while whole layers are chosen, before the first round.
    """

    weights: int
    hidden_states: int
    statistics: int
    solve: int
    layer_choice: int = 0

    @property
    def peak(self) -> int:
        """Statistics of a domain are freed before the solve, and all of the choice before both: the largest counts."""
        return self.weights + max(self._in_a_round, self.layer_choice)

    @property
    def is_of_layer_choice(self) -> bool:
        """Whether the peak is there, and not in a round."""
        return self.layer_choice > self._in_a_round

    @property
    def _in_a_round(self) -> int:
        return self.hidden_states + max(self.statistics, self.solve)


@dataclass(frozen=True, slots=True)
class Work:
    """Operations (an addition and a multiplication are two), or the seconds that they take.

    `forward`: passes through layers and head, in the model's dtype. `gram`: products of statistics, in float32.
    `solve`: inverses, updates and least squares, in float64.
    """

    forward: float
    gram: float
    solve: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.forward + self.gram + self.solve


@dataclass(frozen=True, slots=True)
class Possible:
    """One group of the family. `num_units` of the first layer that has it; `num_params` in all layers."""

    name: str
    unit: str
    num_layers: int
    num_units: int
    num_params: int


@dataclass(frozen=True, slots=True)
class Serving:
    """What a check found. `problems` keep the server from loading the model, `cautions` were not settled."""

    server: str
    num_gpus: int
    problems: tuple[str, ...]
    cautions: tuple[str, ...]

    @property
    def where(self) -> str:
        """The server, and how many GPUs where it splits models over them."""
        gpus = f" on {self.num_gpus} GPU{'s' if self.num_gpus > 1 else ''}" if self.server == "vllm" else ""
        return self.server + gpus


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """One kind of group over all layers that stay, but for protected ones. `num_keep`: mean units that a run leaves."""

    name: str
    unit: str
    num_layers: int
    num_units: int
    num_keep: int
    params_per_unit: int
    num_params: int


@dataclass(frozen=True, slots=True)
class Inspection(Record):
    """A model's structure and the outcome of a recipe's `remove`.

    `remove_asked` and `largest_remove` are shares of what the recipe's target counts, see `outcome`; `remove_reached`
    is one of all parameters. `prices`: seconds measured for target `latency`, as the recipe's key of that name.
    `possible`, `impossible`: every group of the family, and those that it cannot have with the reason. `serving`: what
    stands against serving the result, where asked. `operations` and `seconds` are of the whole run but for the choice
    of whole layers; `disk_bytes` the most that it writes.
    """

    model: str
    family: str
    dtype: str
    size: Size
    num_layers: tuple[int, int]  # before, after
    params_per_layer: int  # of the first one
    groups: tuple[GroupFacts, ...]
    remove_asked: float
    remove_reached: float
    outcome: Outcome
    prices: MeasuredPrices | None
    largest_remove: float
    align: int
    num_params_after: int
    num_bytes_after: int
    num_calibration_tokens: int
    memory: MemoryEstimate
    weights_on_disk: bool
    disk_bytes: int
    device: str
    operations: Work
    seconds: Work
    warnings: tuple[str, ...]
    possible: tuple[Possible, ...]
    impossible: dict[str, str]
    serving: Serving | None

    def plain(self) -> dict[str, Any]:
        """Return the fields as a mapping, the memory's peak included."""
        data = dataclasses.asdict(self)
        data["memory"]["peak"] = self.memory.peak
        return data
