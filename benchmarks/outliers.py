"""How loud are single channels, and what does the ridge of least squares make of them?

Needs the development text as `quality.py` does. Per layer: the energy of the loudest input of the
group's reader over the mean one's, how many are above 30, 100 and 300 times the mean, and the
held-out error without `--share` of the units, mean over domains: nothing refitted; refitted with one
ridge for all inputs, `damping` times the mean of the Gram matrix's diagonal; with a ridge for each,
`damping` times its own entry, as the product does. OBS chooses with the same ridge, on the dense
model's stream. Nothing is guarded. `--layers`: errors of these only, inputs are counted everywhere.

    python benchmarks/outliers.py [--model smollm2-135m] [--group ffn] [--share 0.3] [--num-blocks 6]
                                  [--seed 0] [--damping 0.001] [--layers 0 2 29]
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from quality import draw
from texts import HYBRID
from torch import Tensor, nn

from secateur.methods import compensate
from secateur.methods.select import greedy_obs, units_at_once
from secateur.model.bind import bind
from secateur.model.checkpoint import load_model, load_tokenizer, open_checkpoint
from secateur.model.group import Group, linear, unit_columns
from secateur.stream import statistics
from secateur.stream.measure import measure
from secateur.stream.statistics import Gram, Measurement
from secateur.stream.walk import Walk, make_batches

TIMES_MEAN = (30, 100, 300)


def mean_ridge(gram: Gram, damping: float) -> Tensor:
    """Return the ridge that was: `damping` times the mean, the same for all channels."""
    diagonal_F = gram.diagonal().double()
    return torch.full_like(diagonal_F, damping * float(diagonal_F.mean()))


@contextmanager
def one_ridge_for_all() -> Iterator[None]:
    """Fit with `mean_ridge` inside the block."""
    with patch.object(statistics, "ridge_of", mean_ridge), patch.object(compensate, "ridge_of", mean_ridge):
        yield


def refitted(
    group: Group, reader: nn.Linear, measured: Measurement, share: float, damping: float
) -> tuple[Tensor, Tensor]:
    """Return the columns of the units that OBS keeps, and their refitted weights."""
    num_units, gram = reader.in_features // group.width, measured.pooled.gram
    assert gram is not None
    columns_UW = unit_columns(group.reader.segments, num_units, reader.weight.device)
    batch = units_at_once(None, gram.size, group.width)
    num_keep = num_units - max(1, round(share * num_units))
    kept = greedy_obs(reader.weight, statistics.damped_gram(gram, damping), columns_UW, num_keep, batch).keep
    columns = columns_UW[kept].flatten().sort().values
    return columns, compensate.least_squares(reader.weight.float(), gram, columns, damping).weight_HS


def held_out_error(reader: nn.Linear, measured: Measurement, keep: Tensor, weight_HS: Tensor) -> float:
    """Return |y - x_S W_S'|^2 / |y|^2 on held-out text, mean over domains."""
    errors = []
    for x in measured.held_out_TF.values():
        x_TF = x.float()
        y_TH = x_TF @ reader.weight.float().T
        errors.append(float((y_TH - x_TF[:, keep] @ weight_HS.T).square().sum() / y_TH.square().sum()))
    return sum(errors) / len(errors)


def errors_of(group: Group, reader: nn.Linear, measured: Measurement, share: float, damping: float) -> list[float]:
    """Return the held-out error of nothing refitted, of one ridge for all, of one for each."""
    with one_ridge_for_all():
        fits = [refitted(group, reader, measured, share, damping)]
    fits.append(refitted(group, reader, measured, share, damping))
    columns = fits[1][0]
    fits.insert(0, (columns, reader.weight.float()[:, columns]))
    return [held_out_error(reader, measured, *fit) for fit in fits]


@torch.no_grad()
def main() -> None:
    """Print a row per layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--group", default="ffn")
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--num-blocks", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, nargs="*")
    options = parser.parse_args()
    opened = open_checkpoint(options.model)
    model, tokenizer = load_model(opened), load_tokenizer(opened)
    arch, text = bind(model), draw(HYBRID, 0, options.num_blocks, tokenizer, options.seed)
    batches = [
        batch
        for domain in text.domains
        for ids_NT, held_out in ((domain.calibration_NT, False), (domain.held_out_NT, True))
        for batch in make_batches(domain.name, ids_NT, held_out=held_out)
    ]
    walk, shares = Walk(model, arch, batches), {domain.name: domain.share for domain in text.domains}
    print("| layer | inputs | loudest | " + " | ".join(f"over {times}" for times in TIMES_MEAN), end="")
    print(" | not refitted | one ridge | a ridge each |\n|" + "---:|" * 9)
    for group in arch.select((options.group,)):
        with walk.layer(group.layer) as layer:
            reader = linear(layer, group.reader.module)
            measured = measure(walk, group, "energy", shares, gram=True, to_end=True)
        relative_F = measured.pooled.sum_squares_F / measured.pooled.sum_squares_F.mean()
        counts = [int((relative_F > times).sum()) for times in TIMES_MEAN]
        asked = options.layers is None or group.layer in options.layers
        errors = errors_of(group, reader, measured, options.share, options.damping) if asked else []
        cells = [group.layer, len(relative_F), f"{float(relative_F.max()):.0f}", *counts]
        print("| " + " | ".join(map(str, [*cells, *(f"{error:.4f}" for error in errors)])) + " |", flush=True)


if __name__ == "__main__":
    main()
