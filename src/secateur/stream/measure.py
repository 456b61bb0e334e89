"""Measure one group: run its layer over all batches and collect the reader's input statistics.

Also computes the domain weights that depend on a cut's effect on each domain (`minimax`).
"""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.model.group import Group, linear
from secateur.stream.statistics import (
    BY_DOMAIN,
    Gram,
    GroupStatistics,
    Hand,
    InOrder,
    Statistics,
    complement,
    damped_gram,
    domain_weight,
    inverse_of,
    keep_highest,
    pool,
    removal_errors,
)
from secateur.stream.walk import Walk

MINIMAX_STEPS = 5
STEP_SIZE = 0.5
# A domain's least weight, as a share of an equal one.
FLOOR = 1 / 3
# Enough for the scale of the weights to be exact in float64.
NUM_HALVINGS = 100


def minimax_weights(
    by_domain: dict[str, Statistics],
    shares: dict[str, float],
    reader_HF: Float[Tensor, "H F"],
    columns_UW: Int64[Tensor, "U w"],
    num_keep: int,
    damping: float,
) -> dict[str, float]:
    """Return the weights q, which sum to 1, for pooling the statistics: H = sum_d q_d G_d / e_d.

    Exponentiated gradient from the shares: q_d *= exp(STEP_SIZE * err_d / mean err), projected to 1
    / (3 D) <= q_d <= 1, with err_d = `removal_damage` under H. The weights with the lowest error of
    the worst domain win, the earlier on a tie. `reader_HF` is in float32.

    Source: multiplicative weights for a minimax game, as in group DRO, arXiv 1911.08731, alg. 1.
    """
    floor = FLOOR / len(by_domain)
    weights_D = _at_least(
        torch.tensor([shares[name] for name in by_domain], dtype=torch.float64), floor
    )
    tried: list[tuple[float, dict[str, float]]] = []
    for _ in range(MINIMAX_STEPS):
        named = dict(zip(by_domain, weights_D.tolist(), strict=True))
        gram = pool(by_domain, named).gram
        errors_D = removal_damage(by_domain, gram, reader_HF, columns_UW, num_keep, damping)
        tried.append((float(errors_D.max()), named))
        relative_D = errors_D / errors_D.mean().clamp_min(1e-30)
        weights_D = _at_least(weights_D * (STEP_SIZE * relative_D).exp(), floor)
    return min(tried, key=lambda trial: trial[0])[1]


def removal_damage(
    by_domain: dict[str, Statistics],
    pooled: Gram,
    reader_HF: Float[Tensor, "H F"],
    columns_UW: Int64[Tensor, "U w"],
    num_keep: int,
    damping: float,
) -> Float[Tensor, " D"]:
    """Return each domain's output error over its output energy if the lowest OBS units went now.

    With H the damped pooled matrix and C the columns of those units, refitting changes the reader
    by Delta = W_C ([H^-1]_CC)^-1 [H^-1]_C,: and the error is tr(Delta G_d Delta') / e_d, 0 if e_d =
    0.

    Source: Hassibi and Stork 1993, in the block form of OBC, arXiv 2208.11580, eq. 7.
    """
    inverse, device = inverse_of(damped_gram(pooled, damping)), reader_HF.device
    reader_HF, columns_UW = reader_HF.to(inverse.device), columns_UW.to(inverse.device)
    keep = keep_highest(removal_errors(reader_HF, inverse, columns_UW), num_keep)
    removed = columns_UW[complement(keep, len(columns_UW))].flatten()
    rows_CF = inverse[removed]
    del inverse
    solved_CF = torch.linalg.solve(rows_CF[:, removed], rows_CF)
    change_HF = (reader_HF[:, removed].to(rows_CF) @ solved_CF).float().to(device)
    errors = []
    for statistics in by_domain.values():
        energy = float(statistics.energy)
        errors.append(_output_energy(change_HF, statistics.gram) / energy if energy > 0 else 0.0)
    return torch.tensor(errors, dtype=torch.float64)


def _output_energy(map_HF: Float[Tensor, "H F"], gram: Gram) -> float:
    """Return tr(M G M') from the stored triangle; left of the diagonal blocks counts twice."""
    total = 0.0
    for start, stop, block in zip(gram.starts, gram.stops, gram.blocks, strict=True):
        product = (map_HF[:, start:stop] @ block.to(map_HF.dtype)).mul_(map_HF[:, :stop])
        total += 2 * float(product[:, :start].sum()) + float(product[:, start:].sum())
    return total


def _at_least(weights_D: Float[Tensor, " D"], floor: float) -> Float[Tensor, " D"]:
    """Return clip(c * weights, floor, 1) with c such that the sum is 1: the nearest by KL."""
    low, high = 0.0, 1 / float(weights_D.min())
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        if float((middle * weights_D).clamp(floor, 1).sum()) < 1:
            low = middle
        else:
            high = middle
    return (high * weights_D).clamp(floor, 1)


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
    hand: Hand | None = None,
) -> GroupStatistics:
    """Return the group's statistics on the pruned stream; the walk must stand before its layer.

    `drift`: also of (dense stream - pruned stream) after the layer; the dense stream must be there
    already. `to_middle`, `to_end`: leave the walk after the attention or the layer, see `Walk.run`.
    `hand`: what the pooled statistics and the domains' energies go through.

    Raises NumericsError naming layer, module and domain if an input is not finite.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0], output))

    energy, by_domain = dict[str, float](), dict[str, Statistics]()
    held_out = defaultdict[str, list[Tensor]](list)
    held_out_drift = defaultdict[str, list[Tensor]](list)
    with walk.layer(group.layer) as layer:
        reader = linear(layer, group.reader.module)
        sizes: Any = {
            "gram": gram or weighting in BY_DOMAIN,
            "drift_size": reader.out_features if drift else 0,
        }
        empty = partial(Statistics.empty, reader.in_features, reader.weight.device, **sizes)
        pooled, current = empty(dtype=torch.float32), empty()

        def fold(domain: str) -> None:
            """Pool the domain that has ended."""
            current.sum_over_ranks()
            if not current.is_finite():
                raise NumericsError(
                    f"layer {group.layer}, {group.reader.module}, domain {domain}: the input holds "
                    "NaN or infinite numbers; use the model in bfloat16 or float32 and check its "
                    "weights."
                )
            energy[domain] = float(current.energy)
            pooled.merge(current, domain_weight(weighting, shares[domain], energy[domain]))
            if weighting in BY_DOMAIN:
                by_domain[domain] = empty(dtype=torch.float32)
                by_domain[domain].merge(current)
            current.clear()

        # A domain's statistics are of the tokens that count; of held-out text the inputs themselves
        # are kept.
        domains = InOrder(shares, fold)
        with reader.register_forward_hook(note):
            for position, (batch, output) in enumerate(
                walk.run(group.layer, to_middle=to_middle, to_end=to_end)
            ):
                x_TF, y_TH = map(batch.counted, seen.pop())
                # Both streams have their dtype's precision, so their difference needs no more.
                drift_TH = batch.counted(walk.dense_BTD[position] - output) if drift else None
                if not batch.held_out:
                    domains.begin(batch.domain)
                    current.update(
                        x_TF, y_TH if reader.bias is None else y_TH - reader.bias, drift_TH
                    )
                    continue
                held_out[batch.domain].append(x_TF)
                if drift_TH is not None:
                    held_out_drift[batch.domain].append(drift_TH)
        domains.begin("")
        if hand is not None:
            energy = hand(pooled, energy)

        # One domain at a time, to bound peak memory.
        both = held_out, held_out_drift
        held_out_TF, drift_TH = (
            {name: torch.cat(pieces.pop(name)) for name in list(pieces)} for pieces in both
        )
        return GroupStatistics(pooled, energy, held_out_TF, drift_TH, by_domain)
