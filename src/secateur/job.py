"""A job: one prune with everything at hand, and what is measured of its model before and after.

In: the dense model loaded, the text packed, the numbers resolved. Out: held-out losses, in the run log too.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.arch import Arch
from secateur.calibration import CalibrationSet
from secateur.device import peak_bytes_on
from secateur.estimate import MemoryPlan
from secateur.layers_on_device import Placement
from secateur.loss import Loss, domain_losses
from secateur.progress import Progress
from secateur.resolve import Resolved
from secateur.runlog import RunLog
from secateur.store import Store
from secateur.summary import Losses, Size


@dataclass(frozen=True, slots=True)
class Job:
    """`name`: what the user calls the model. `command`: how to repeat the run, for the model card.

    `dense_size`: of the model as it was stored.
    """

    name: str
    command: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    arch: Arch
    resolved: Resolved
    calibration: CalibrationSet
    log: RunLog
    store: Store
    progress: Progress
    plan: MemoryPlan
    device: torch.device
    placement: Placement
    dense_size: Size

    def evaluate(self, which: str) -> Losses:
        """Return held-out losses by domain, or none where the recipe asks for none."""
        if not self.resolved.recipe.evaluate:
            return {}
        blocks = {domain.name: domain.held_out_NT for domain in self.calibration.domains}

        def measured() -> dict[str, Any]:
            losses = domain_losses(self.model, self.arch, blocks, self.progress, f"evaluate {which}")
            return {domain: dataclasses.asdict(loss) for domain, loss in losses.items()}

        with self.log.time("evaluate"):
            found = self.store.value(f"evaluate {which}", measured)
        for domain, loss in found.items():
            self.log.write({"event": "loss", "model": which, "domain": domain, **loss})
        return {domain: Loss(**loss) for domain, loss in found.items()}

    def come_home(self) -> int | None:
        """Bring the model to ordinary memory, where it is saved and proved; return the most that the device held."""
        peak = peak_bytes_on(self.device)
        self.placement.come_home()
        return peak

    def at_home(self, act: Callable[..., None]) -> Callable[..., None]:
        """Return what does the same while the model is in ordinary memory."""

        def acting(*arguments: Any) -> None:
            with self.placement.at_home():
                act(*arguments)

        return acting

    def notes(self) -> tuple[str, ...]:
        """Return what people should know of the run so far."""
        lines = (line["text"] for line in self.log.lines if line["event"] == "note")
        plan = self.plan
        if plan.in_float32:
            stored = str(self.model.dtype).removeprefix("torch.")
            lines = (f"computed in float32 on {self.device}; stored in {stored} as before.", *lines)
        if plan.one_layer_at_a_time and plan.budget_bytes is not None:
            gigabytes = f"{plan.budget_bytes / 1e9:.2f} GB"
            lines = (f"layers came to {self.device} one at a time to keep within {gigabytes}.", *lines)
        return (*self.resolved.warnings, *lines)
