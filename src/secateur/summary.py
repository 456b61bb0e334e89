"""What a run cost and kept, as plain numbers: written to `result.json`, shown as a table, told in the model card.

In: figures of each stage. Out: frozen dataclasses that go to JSON and back. No figure is computed twice.
"""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.arch import Group
from secateur.json_file import Record
from secateur.loss import Loss, geometric_mean_perplexity
from secateur.plugins import plugin_packages
from secateur.prices import Outcome

RESULT_FILE = "result.json"

Losses = dict[str, Loss]


@dataclass(frozen=True, slots=True)
class Size:
    """`num_params`: all parameters, tied ones once. `num_bytes`: their storage."""

    num_params: int
    num_bytes: int

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Size":
        """Count a model's parameters."""
        parameters = list(model.parameters())
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        return cls(sum(parameter.numel() for parameter in parameters), num_bytes)


@dataclass(frozen=True, slots=True)
class CalibrationFacts:
    """Which text the run saw, by domain.

    `held_out_overlap`: share of the held-out text's 13-grams that the calibration text has too (see `overlap`).
    """

    content_hash: str
    sequence_length: int
    num_tokens: dict[str, int]
    num_held_out_tokens: dict[str, int]
    held_out_overlap: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Summary(Record):
    """Everything a run can say about itself in numbers.

    `remove_asked` is a share of what the recipe's target counts, see `outcome`; `remove_reached` of all parameters.
    """

    model: str
    family: str
    command: str
    remove_asked: float
    remove_reached: float
    outcome: Outcome
    dense_size: Size
    pruned_size: Size
    num_layers: tuple[int, int]  # before, after
    widths: dict[str, tuple[int, int, int]]  # group -> units per layer before; after, in the narrowest and widest
    calibration: CalibrationFacts
    dense_losses: Losses
    pruned_losses: Losses
    guard_refusals: int
    seconds: dict[str, float]
    peak_bytes: int
    reload_max_abs_difference: float | None
    sample_text: str | None
    warnings: tuple[str, ...]
    versions: dict[str, str]
    device: str = "cpu"
    device_peak_bytes: int | None = None  # allocated there, where torch counts it

    def plain(self) -> dict[str, Any]:
        """Return the fields as a mapping, with derived perplexities beside the losses."""
        perplexities = {name: geometric_mean_perplexity(losses) for name, losses in self.losses_by_name().items()}
        return {**dataclasses.asdict(self), "geometric_mean_perplexity": perplexities}

    @property
    def has_layers_of_different_widths(self) -> bool:
        """Say whether any group kept more units in one layer than in another."""
        return any(least != most for _, least, most in self.widths.values())

    def losses_by_name(self) -> dict[str, Losses]:
        """Return the evaluated models' losses, dense first; those not evaluated are left out."""
        named = {"dense": self.dense_losses, "pruned": self.pruned_losses}
        return {name: losses for name, losses in named.items() if losses}


def group_widths(groups: tuple[Group, ...], keeps: Mapping[tuple[int, str], Tensor]) -> dict[str, tuple[int, int, int]]:
    """Return, by kind of group, units per layer before, and after in the narrowest and the widest layer."""
    widths: dict[str, tuple[int, int, int]] = {}
    for group in groups:
        keep = keeps.get((group.layer, group.name))
        kept = group.num_units if keep is None else keep.shape[-1]
        before, least, most = widths.get(group.name, (group.num_units, kept, kept))
        widths[group.name] = (before, min(least, kept), max(most, kept))
    return widths


def versions() -> dict[str, str]:
    """Return the versions that a repeat of the run needs, those of packages that extend secateur among them."""
    packages = ("secateur", "torch", "transformers", "safetensors", "tokenizers")
    found: dict[str, Any] = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found, **plugin_packages()}
