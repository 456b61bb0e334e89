"""What a run cost and kept, as plain numbers: written to `result.json`, shown as a table, told in the model card.

In: figures of each stage. Out: frozen dataclasses that go to JSON and back. No figure is computed twice.
"""

import dataclasses
import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Any

from secateur.facts import Loss, Outcome, Size, geometric_mean_perplexity
from secateur.json_file import Record
from secateur.plugins import plugin_packages

RESULT_FILE = "result.json"

Losses = dict[str, Loss]


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


def versions() -> dict[str, str]:
    """Return the versions that a repeat of the run needs, those of packages that extend secateur among them."""
    packages = ("secateur", "torch", "transformers", "safetensors", "tokenizers")
    found: dict[str, Any] = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found, **plugin_packages()}
