"""A run: everything that the loop and the planning of its rounds work on."""

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
from secateur.progress import Progress, silent
from secateur.ranks import own_part
from secateur.resolve import Resolved
from secateur.store import Store
from secateur.walk import Batch, make_batches

Keeps = dict[GroupKey, Tensor]


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a prune works on, step by step.

    `weights_on_disk`: finished layers are mapped from files, so that of the weights only one layer's fill memory.
    `scratch`: a directory for files of this run alone; None: where the system has temporary files.
    `after_round`: is told the number of every round that held, while the model is as that round left it, its config
    included, and which units are left.
    `dense_losses`: held-out nats per token by domain before layers were removed, where something watches them.
    `store`: what an interrupted run of the same inputs has finished; without a directory it knows and keeps nothing.
    """

    model: PreTrainedModel
    arch: Arch
    resolved: Resolved
    calibration: CalibrationSet
    log: Callable[[dict[str, Any]], None] = lambda line: None
    progress: Progress = silent
    scratch: Path | None = None
    after_round: Callable[[int, Keeps], None] | None = None
    dense_losses: dict[str, float] = field(default_factory=dict[str, float])
    weights_on_disk: bool = False
    store: Store = field(default_factory=Store)

    @property
    def shares(self) -> dict[str, float]:
        """Each domain's share of the calibration tokens."""
        return {domain.name: domain.share for domain in self.calibration.domains}

    @property
    def held_out(self) -> dict[str, Tensor]:
        """Each domain's held-out blocks, domains x blocks x tokens."""
        return {domain.name: domain.held_out_NT for domain in self.calibration.domains}

    def batches(self, number: int) -> list[Batch]:
        """Return what round `number` (from 1) measures on, held-out batches marked; a rank's own part of it."""
        device: torch.device = next(self.model.parameters()).device
        batches: list[Batch] = []
        for domain in rotated(self.calibration, number - 1).domains:
            batches += make_batches(domain.name, domain.calibration_NT.to(device), held_out=False)
            batches += make_batches(domain.name, domain.held_out_NT.to(device), held_out=True)
        # Dealt out whole, so that every hidden state is, bit for bit, what one process computes.
        return own_part(batches)
