"""Measure one group: run its layer over all batches and collect the reader's input statistics."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.facts import Batch
from secateur.model.group import Group, linear
from secateur.stream.statistics import InOrder, Measurement, Statistics, domain_weight
from secateur.stream.walk import Walk


class _Gatherer:
    """Collects reader inputs batch by batch, and pools a domain as soon as the next one begins."""

    def __init__(
        self, group: Group, reader: nn.Linear, weighting: str, shares: dict[str, float], gram: bool, drift: bool
    ) -> None:
        self.group, self.reader, self.weighting, self.shares = group, reader, weighting, shares
        sizes: Any = {"gram": gram, "drift_size": reader.out_features if drift else 0}
        self.empty = partial(Statistics.empty, reader.in_features, reader.weight.device, **sizes)
        self.pooled, self.current = self.empty(dtype=torch.float32), self.empty()
        self.domains = InOrder(shares)
        self.energy: dict[str, float] = {}
        self.held_out: dict[str, list[Tensor]] = {}
        self.held_out_drift: dict[str, list[Tensor]] = {}

    def add(self, batch: Batch, x: Tensor, y: Tensor, drift: Tensor | None) -> None:
        """Add the tokens of a batch that count: their statistics, or their inputs if it is held out."""
        x_TF, y_TH = batch.counted(x), batch.counted(y)
        drift_TH = None if drift is None else batch.counted(drift)
        if batch.held_out:
            self.held_out.setdefault(batch.domain, []).append(x_TF)
            if drift_TH is not None:
                self.held_out_drift.setdefault(batch.domain, []).append(drift_TH)
            return
        self.pool_ended(batch.domain)
        self.current.update(x_TF, y_TH if self.reader.bias is None else y_TH - self.reader.bias, drift_TH)

    def pool_ended(self, begins: str) -> None:
        """Pool the domains that end where this one begins."""
        for domain in self.domains.begin(begins):
            self.fold(domain)

    def fold(self, domain: str) -> None:
        """Pool the domain that has ended. Raises NumericsError if an input is not finite."""
        self.current.sum_over_ranks()
        if not self.current.is_finite():
            where = f"layer {self.group.layer}, {self.group.reader.module}, domain {domain}"
            advice = "use the model in bfloat16 or float32 and check its weights"
            raise NumericsError(f"{where}: the input holds NaN or infinite numbers; {advice}.")
        self.energy[domain] = float(self.current.energy)
        self.pooled.merge(self.current, domain_weight(self.weighting, self.shares[domain], self.energy[domain]))
        self.current.clear()

    def finish(self) -> Measurement:
        """Pool the last domain and return the measurement."""
        self.pool_ended("")
        # Concatenate one domain at a time to bound peak memory.
        both = self.held_out, self.held_out_drift
        held_out, drift = ({name: torch.cat(pieces.pop(name)) for name in list(pieces)} for pieces in both)
        return Measurement(self.pooled, self.energy, held_out, drift)


@torch.no_grad()
def measure(
    walk: Walk,
    group: Group,
    weighting: str,
    shares: dict[str, float],
    *,
    gram: bool,
    drift: bool = False,
    to_middle: bool = False,
    to_end: bool = False,
) -> Measurement:
    """Return the group's statistics on the pruned stream; the walk must stand before its layer.

    `drift`: also of (dense stream - pruned stream) after the layer; the dense stream must be there
    already. `to_middle`, `to_end`: leave the walk after the attention or the layer, see `Walk.run`.

    Raises NumericsError naming layer, module and domain if an input is not finite.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0], output))

    with walk.layer(group.layer) as layer:
        reader = linear(layer, group.reader.module)
        gatherer = _Gatherer(group, reader, weighting, shares, gram, drift)
        handle = reader.register_forward_hook(note)
        try:
            for position, (batch, output) in enumerate(walk.run(group.layer, to_middle=to_middle, to_end=to_end)):
                # Both streams have their dtype's precision, so their difference needs no more.
                after = walk.dense_BTD[position] - output if drift else None
                gatherer.add(batch, *seen.pop(), after)
        finally:
            handle.remove()
        return gatherer.finish()
