"""What every norm over the residual stream gives its readers, norm by norm in one walk of the dense model.

In: a model, calibration batches. Out, per norm: statistics of its output pooled over domains, its held-out outputs, and
what its readers make of them.

Letters: T tokens, D hidden size, H reader outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.arch import Arch, decoder_layers, linear
from secateur.errors import NumericsError
from secateur.hidden_cut import NormKey, hidden_of, norms_of
from secateur.layers_on_device import fetch
from secateur.measure import Measurement
from secateur.memory import release_freed
from secateur.ranks import domains_ended
from secateur.stats import BY_DOMAIN, Statistics, domain_weight
from secateur.walk import Batch, Walk

# Rows of a weight that are converted to float32 at a time; a head has a hundred thousand.
PIECE_ROWS = 4096


@dataclass(frozen=True, slots=True)
class NormMeasurement:
    """`measured`: the norm's output, for readers of it. `square_DD`: W'W with W all readers' weights one below another.

    The pooled statistics' energy is that of all readers together.
    """

    measured: Measurement
    square_DD: Tensor


class _Gatherer:
    """Takes a norm's outputs; folds a domain into the pooled statistics as soon as the next one begins."""

    def __init__(self, key: NormKey, square_DD: Tensor, weighting: str, shares: dict[str, float]) -> None:
        self.key, self.square_DD, self.shares = key, square_DD, shares
        self.weighting = "energy" if weighting in BY_DOMAIN else weighting
        size, device = len(square_DD), square_DD.device
        self.pooled = Statistics.empty(size, device, gram=True, dtype=torch.float32)
        self.current = Statistics.empty(size, device, gram=True)
        self.domain = ""
        self.energy: dict[str, float] = {}
        self.held_out: dict[str, list[Tensor]] = {}

    def add(self, batch: Batch, output_BTD: Tensor) -> None:
        output_TD = output_BTD.flatten(0, -2)
        if batch.held_out:
            self.held_out.setdefault(batch.domain, []).append(output_TD)
            return
        if batch.domain != self.domain:
            self.fold_until(batch.domain)
        self.current.update(output_TD, output_TD[:, :0])

    def fold_until(self, begun: str) -> None:
        for domain in domains_ended(self.domain, begun, self.shares):
            self.fold(domain)
        self.domain = begun

    def fold(self, domain: str) -> None:
        self.current.sum_over_ranks()
        gram = self.current.gram
        assert gram is not None
        # The energy of all readers' outputs, from sums that are there anyway: tr(W G W').
        self.current.energy.copy_((gram.full() * self.square_DD).sum())
        if not self.current.is_finite():
            layer, norm = self.key
            raise NumericsError(
                f"layer {layer}, {norm}, domain {domain}: the output holds NaN or infinite numbers; use the model "
                f"in bfloat16 or float32 and check its weights."
            )
        self.energy[domain] = float(self.current.energy)
        self.pooled.merge(self.current, domain_weight(self.weighting, self.shares[domain], self.current))
        self.current.clear()
        release_freed()

    def finish(self) -> NormMeasurement:
        self.fold_until("")
        held_out = {name: torch.cat(self.held_out.pop(name)) for name in list(self.held_out)}
        return NormMeasurement(Measurement(self.pooled, self.energy, held_out, {}), self.square_DD)


def measured_norms(
    model: nn.Module, arch: Arch, batches: list[Batch], shares: dict[str, float], weighting: str
) -> Iterator[tuple[NormKey, NormMeasurement]]:
    """Yield every norm of `readers_of` with its measurement, the last one too, in the order of layers.

    When a layer's norms are yielded, the stream is behind the layer, so the caller may change it. The head counts with
    its logits around their mean over the vocabulary, which is all that its softmax sees. Pooled by domain as `measure`
    does; `minimax` counts as `energy`. Raises NumericsError naming layer, norm and domain.
    """
    walk, norms, readers = Walk(model, arch, batches), norms_of(model, arch), readers_of(model, arch)
    for index in range(arch.num_layers):
        fetch(walk.layers[index])
        gatherers = {
            key: _Gatherer(key, _square(list(readers[key].values())), weighting, shares)
            for key in readers
            if key[0] == index
        }
        seen: dict[NormKey, Tensor] = {}
        handles = [norms[key].register_forward_hook(_note(seen, key)) for key in gatherers]
        try:
            behind: list[Tensor] = []
            for batch, output_BTD in walk.run(index):
                behind.append(output_BTD)
                for key, gatherer in gatherers.items():
                    gatherer.add(batch, seen.pop(key))
        finally:
            for handle in handles:
                handle.remove()
        walk.hidden_BTD = behind
        while gatherers:
            key = next(iter(gatherers))
            yield key, gatherers.pop(key).finish()
    last = (arch.num_layers, hidden_of(arch).norm)
    gatherer = _Gatherer(last, _square(list(readers[last].values()), around_mean=True), weighting, shares)
    for batch, hidden_BTD in zip(walk.batches, walk.hidden_BTD, strict=True):
        with torch.inference_mode():
            gatherer.add(batch, norms[last](hidden_BTD))
    yield last, gatherer.finish()


def readers_of(model: nn.Module, arch: Arch) -> dict[NormKey, dict[str, nn.Linear]]:
    """Return the linears that read each norm over the stream, layer by layer; the head for the last one."""
    layers, by_norm = decoder_layers(model, arch), dict(hidden_of(arch).readers)
    found = {
        (index, norm): {name: linear(layers[index], name) for name in by_norm[norm]}
        for index, norm in norms_of(model, arch)
        if norm in by_norm
    }
    return found | {(arch.num_layers, hidden_of(arch).norm): {arch.head: linear(model, arch.head)}}


def _square(readers: list[nn.Linear], *, around_mean: bool = False) -> Float[Tensor, "D D"]:
    """Return W'W of all readers together, in float32. `around_mean`: with each column less its mean."""
    square_DD = torch.zeros(readers[0].in_features, readers[0].in_features, device=readers[0].weight.device)
    for reader in readers:
        weight_HD = reader.weight.detach()
        for piece_HD in weight_HD.split(PIECE_ROWS):
            square_DD.addmm_(piece_HD.float().T, piece_HD.float())
        if around_mean:
            mean_D = weight_HD.mean(dim=0, dtype=torch.float32)
            square_DD.addr_(mean_D, mean_D, alpha=-len(weight_HD))
    return square_DD


def _note(seen: dict[NormKey, Tensor], key: NormKey) -> Any:
    def note(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        seen[key] = output

    return note
