"""A run: everything that its steps work on, and the services that they report to and go on from."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.arch import Arch
from secateur.budget import GroupKey
from secateur.calibration import CalibrationSet, rotated
from secateur.facts import Loss
from secateur.loss import domain_losses
from secateur.progress import Progress, silent
from secateur.ranks import own_part
from secateur.resolve import Resolved
from secateur.runlog import RunLog
from secateur.store import Store
from secateur.walk import Batch, make_batches

Keeps = dict[GroupKey, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What a long job reports to and goes on from. The defaults watch and keep nothing.

    `store`: what an interrupted run of the same inputs has finished; without a directory it knows and keeps nothing.
    `scratch`: a directory for files of this run alone; None: where the system has temporary files.
    """

    progress: Progress = silent
    log: RunLog = field(default_factory=RunLog)
    store: Store = field(default_factory=Store)
    scratch: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that a prune works on, step by step. `text`: the calibration set.

    `weights_on_disk`: finished layers are mapped from files, so that of the weights only one layer's fill memory.
    `after_round`: is told the number of every round that held, while the model is as that round left it, its config
    included, and which units are left.
    `dense_losses`: held-out nats per token by domain before layers were removed, where something watches them.
    """

    model: PreTrainedModel
    arch: Arch
    resolved: Resolved
    text: CalibrationSet
    services: Services = field(default_factory=Services)
    weights_on_disk: bool = False
    after_round: Callable[[int, Keeps], None] | None = None
    dense_losses: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def shares(self) -> dict[str, float]:
        """Each domain's share of the calibration tokens."""
        return {domain.name: domain.share for domain in self.text.domains}

    @property
    def held_out(self) -> dict[str, Tensor]:
        """Each domain's held-out blocks, domains x blocks x tokens."""
        return {domain.name: domain.held_out_NT for domain in self.text.domains}

    def batches(self, number: int) -> list[Batch]:
        """Return what round `number` (from 1) measures on, held-out batches marked; a rank's own part of it."""
        device: torch.device = next(self.model.parameters()).device
        batches: list[Batch] = []
        for domain in rotated(self.text, number - 1).domains:
            batches += make_batches(domain.name, domain.calibration_NT.to(device), held_out=False)
            batches += make_batches(domain.name, domain.held_out_NT.to(device), held_out=True)
        # Dealt out whole, so that every hidden state is, bit for bit, what one process computes.
        return own_part(batches)

    def losses(self, which: str) -> dict[str, Loss]:
        """Return held-out losses by domain, in the run log too; none where the recipe asks for none."""
        if not self.resolved.recipe.evaluate:
            return {}
        log = self.services.log

        def measured() -> dict[str, Any]:
            losses = domain_losses(self.model, self.arch, self.held_out, self.services.progress, f"evaluate {which}")
            return {domain: dataclasses.asdict(loss) for domain, loss in losses.items()}

        with log.time("evaluate"):
            found = self.services.store.value(f"evaluate {which}", measured)
        for domain, loss in found.items():
            log.write({"event": "loss", "model": which, "domain": domain, **loss})
        return {domain: Loss(**loss) for domain, loss in found.items()}
