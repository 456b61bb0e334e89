"""Domain weights that look at what a cut would do to each domain: `minimax`.

In: each domain's own statistics of one reader's inputs, and how many units are to stay. Out: the weights to pool them
with. What a cut would do is taken from a cheap one: all units chosen at once by OBS, the
others refitted by least squares. All domains' Gram matrices stand together until the weights are found, beside the
pooled one and its float64 inverse.

Letters: D domains, H reader outputs, F reader columns, U units, w columns of one unit, C columns that go.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.gram import Gram
from secateur.score import damped_gram, inverse_of, keep_highest, removal_errors
from secateur.stats import Statistics, pool

NUM_STEPS = 5
STEP_SIZE = 0.5
# A domain's weight is at least this part of an equal one.
FLOOR = 1 / 3
# Halvings until the scale of the weights is exact in float64.
NUM_HALVINGS = 100


def minimax_weights(
    by_domain: dict[str, Statistics],
    shares: dict[str, float],
    reader_HF: Float[Tensor, "H F"],
    columns_UW: Int64[Tensor, "U w"],
    num_keep: int,
    damping: float,
) -> dict[str, float]:
    """Return the weights q, which sum to 1, to pool the statistics with: H = sum_d q_d G_d / e_d.

    Exponentiated gradient from the shares on: q_d *= exp(STEP_SIZE * err_d / mean err), brought back to
    1 / (3 D) <= q_d <= 1, with err_d = `removal_damage` under H. The weights with the lowest error of the worst domain
    win, the earlier on a tie. `reader_HF` is in float32.

    Source: multiplicative weights for a minimax game, as group DRO uses them, Sagawa et al., arXiv 1911.08731, alg. 1.
    """
    floor = FLOOR / len(by_domain)
    weights_D = _at_least(torch.tensor([shares[name] for name in by_domain], dtype=torch.float64), floor)
    tried: list[tuple[float, dict[str, float]]] = []
    for _ in range(NUM_STEPS):
        named = dict(zip(by_domain, weights_D.tolist(), strict=True))
        gram = pool(by_domain, named).gram
        assert gram is not None
        errors_D = removal_damage(by_domain, gram, reader_HF, columns_UW, num_keep, damping)
        tried.append((float(errors_D.max()), named))
        relative_D = errors_D / errors_D.mean().clamp_min(1e-30)
        weights_D = _at_least(weights_D * (STEP_SIZE * relative_D).exp(), floor)
    return min(tried, key=lambda each: each[0])[1]


def removal_damage(
    by_domain: dict[str, Statistics],
    pooled: Gram,
    reader_HF: Float[Tensor, "H F"],
    columns_UW: Int64[Tensor, "U w"],
    num_keep: int,
    damping: float,
) -> Float[Tensor, " D"]:
    """Return each domain's output error as a share of its output energy, if the least units of OBS went at once.

    With H the damped pooled matrix and C the columns of the units that go, the reader's change after refitting is
    Delta = W_C ([H^-1]_CC)^-1 [H^-1]_C,: and the error tr(Delta G_d Delta') / e_d; 0 for a silent domain.
    Source: Hassibi and Stork 1993, in the block form of OBC, arXiv 2208.11580, eq. 7.
    """
    inverse, home = inverse_of(damped_gram(pooled, damping)), reader_HF.device
    reader_HF, columns_UW = reader_HF.to(inverse.device), columns_UW.to(inverse.device)
    stays = torch.zeros(len(columns_UW), dtype=torch.bool, device=inverse.device)
    stays[keep_highest(removal_errors(reader_HF, inverse, columns_UW), num_keep)] = True
    gone = columns_UW[~stays].flatten()
    rows_CF = inverse[gone]
    del inverse
    change_HF = (reader_HF[:, gone].to(rows_CF) @ torch.linalg.solve(rows_CF[:, gone], rows_CF)).float().to(home)
    errors = []
    for statistics in by_domain.values():
        assert statistics.gram is not None
        energy = float(statistics.energy)
        errors.append(_output_energy(change_HF, statistics.gram) / energy if energy > 0 else 0.0)
    return torch.tensor(errors, dtype=torch.float64)


def _output_energy(map_HF: Float[Tensor, "H F"], gram: Gram) -> float:
    """Return tr(M G M'), reading the triangle that is stored: what lies left of the diagonal blocks counts twice."""
    total = 0.0
    for start, stop, block in zip(gram.starts, gram.stops, gram.blocks, strict=True):
        product = (map_HF[:, start:stop] @ block.to(map_HF.dtype)).mul_(map_HF[:, :stop])
        total += 2 * float(product[:, :start].sum()) + float(product[:, start:].sum())
    return total


def _at_least(weights_D: Float[Tensor, " D"], floor: float) -> Float[Tensor, " D"]:
    """Return clip(c * weights, floor, 1) with the c that makes the sum 1: the nearest such weights by KL."""
    low, high = 0.0, 1 / float(weights_D.min())
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        if float((middle * weights_D).clamp(floor, 1).sum()) < 1:
            low = middle
        else:
            high = middle
    return (high * weights_D).clamp(floor, 1)
