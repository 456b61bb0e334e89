"""Measure one group: run its layer over all batches and gather the reader's input statistics, domain by domain.

In: the walk standing before the layer. Out: statistics summed over ranks and pooled over domains, and this rank's
held-out inputs themselves, which are fewer numbers than their Gram matrices would be and give exact held-out errors. A
domain's own statistics are kept only for the weightings that look at it by itself.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.arch import Group, linear
from secateur.errors import NumericsError
from secateur.stats import BY_DOMAIN, InOrder, Statistics, domain_weight
from secateur.walk import Batch, Walk


@dataclass(frozen=True, slots=True)
class Measurement:
    """`pooled`: statistics weighted over domains. `energy`: sum |y|^2 by domain.

    `held_out_TF`: this rank's inputs of the reader by domain; `held_out_drift_TH`: where asked, the drift on the same
    tokens.
    `by_domain`: each domain's own statistics, for the weightings of `stats.BY_DOMAIN` alone.
    """

    pooled: Statistics
    energy: dict[str, float]
    held_out_TF: dict[str, Tensor]
    held_out_drift_TH: dict[str, Tensor]
    by_domain: dict[str, Statistics] = field(default_factory=dict)


class _Gatherer:
    """Takes reader inputs batch by batch; folds a domain into the pooled statistics as soon as the next one begins."""

    def __init__(
        self, group: Group, reader: nn.Linear, weighting: str, shares: dict[str, float], gram: bool, drift: bool
    ) -> None:
        self.group, self.reader, self.weighting, self.shares = group, reader, weighting, shares
        self.gram = gram or weighting in BY_DOMAIN
        self.num_drift_outputs = reader.out_features if drift else 0
        self.pooled, self.current = self.empty(torch.float32), self.empty()
        self.domains = InOrder(shares, self.fold)
        self.energy: dict[str, float] = {}
        self.held_out: dict[str, list[Tensor]] = {}
        self.held_out_drift: dict[str, list[Tensor]] = {}
        self.by_domain: dict[str, Statistics] = {}

    def empty(self, dtype: torch.dtype | None = None) -> Statistics:
        device, num_outputs = self.reader.weight.device, self.num_drift_outputs
        return Statistics.empty(
            self.reader.in_features, device, gram=self.gram, num_drift_outputs=num_outputs, dtype=dtype
        )

    def add(self, batch: Batch, x: Tensor, y: Tensor, drift: Tensor | None) -> None:
        x_TF, y_TH = x.flatten(0, -2), y.flatten(0, -2)
        drift_TH = None if drift is None else drift.flatten(0, -2)
        if batch.held_out:
            self.held_out.setdefault(batch.domain, []).append(x_TF)
            if drift_TH is not None:
                self.held_out_drift.setdefault(batch.domain, []).append(drift_TH)
            return
        self.domains.begin(batch.domain)
        self.current.update(x_TF, y_TH if self.reader.bias is None else y_TH - self.reader.bias, drift_TH)

    def fold(self, domain: str) -> None:
        self.current.sum_over_ranks()
        if not self.current.is_finite():
            raise NumericsError(
                f"layer {self.group.layer}, {self.group.reader.module}, domain {domain}: the input holds NaN "
                f"or infinite numbers; use the model in bfloat16 or float32 and check its weights."
            )
        weight = domain_weight(self.weighting, self.shares[domain], float(self.current.energy))
        self.energy[domain] = float(self.current.energy)
        self.pooled.merge(self.current, weight)
        if self.weighting in BY_DOMAIN:
            self.by_domain[domain] = self.empty(torch.float32)
            self.by_domain[domain].merge(self.current)
        self.current.clear()

    def finish(self) -> Measurement:
        self.domains.end()
        # Concatenate one domain at a time to bound peak memory.
        held_out, drift = (
            {name: torch.cat(pieces.pop(name)) for name in list(pieces)}
            for pieces in (self.held_out, self.held_out_drift)
        )
        return Measurement(self.pooled, self.energy, held_out, drift, self.by_domain)


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
    """Return the group's statistics on the pruned stream. The walk must stand before the group's layer.

    `drift`: also those of (dense stream - pruned stream) behind the layer, whose dense stream must have moved already.
    `to_middle`, `to_end`: leave the walk behind the layer's attention, or behind the layer; see `Walk.run`.

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
                # Both streams are rounded to their dtype already, so rounding their difference to it loses nothing.
                behind = walk.dense_BTD[position] - output if drift else None
                gatherer.add(batch, *seen.pop(), behind)
        finally:
            handle.remove()
        return gatherer.finish()
