"""Seconds of a prune on one GPU (or another device) beside a roofline.

A random model of a known shape (`make_shape.py`) is pruned by `secateur prune` in a process of its
own; load, save and reload check count. The roofline divides the run's FLOPs (`work_of`) by the
device's rate of matrix products, measured just before: bfloat16 for forward passes, TF32 for
Gram matrices of bfloat16 inputs (exact), float64 for solves. To this it adds the bytes read and
written over `--disk-gbps`. The mark is for one H100 and this script's defaults.

    python benchmarks/gpu.py [--device cuda] [--shape qwen2.5-7b] [--layers 28] [--num-blocks 128]
                             [--sequence-length 2048] [--remove 0.2] [--folder DIR] [--dense DIR]
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from make_shape import SHAPES, write_shape

from secateur.pruning.cost import measured_rates, work_of
from secateur.pruning.open import open_model
from secateur.pruning.resolve import checked, resolve
from secateur.ranks import device_called
from secateur.recipe_file import parse_recipe

MARK_SECONDS = 90.0
ROWS = 8192  # of the products that are timed: enough to fill a large GPU


def main() -> None:
    """Write the shape unless a model is given, then run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--num-blocks", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--remove", type=float, default=0.2)
    parser.add_argument("--disk-gbps", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--dense", type=Path, help="a local model, instead of a shape")
    options = parser.parse_args()
    device = device_called(options.device)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="gpu-") as name:
        folder = Path(name)
        if options.dense is None:
            write_shape(options.shape, folder / "dense", options.layers)
        run(options.dense or folder / "dense", folder, device, options)


def run(dense: Path, folder: Path, device: torch.device, options: argparse.Namespace) -> None:
    """Prune once; print seconds by stage, the roofline by kind of work, and the mark."""
    asked: dict[str, Any] = {
        "remove": {"share": options.remove, "align": 256},
        "machine": {"device": options.device},
        "polish": False,
        "calibration": {
            "num_tokens": options.num_blocks * options.sequence_length,
            "sequence_length": options.sequence_length,
        },
    }
    (folder / "recipe.json").write_text(json.dumps(asked), encoding="utf-8")
    opened = checked(open_model(dense, parse_recipe(asked), weights=False))
    model = opened.model
    num_bytes = opened.size.num_bytes
    work = dataclasses.asdict(work_of(opened, resolve(opened)))
    rate = dataclasses.asdict(measured_rates(device, model.dtype, model.config.hidden_size, rows=ROWS))
    command = [sys.executable, "-m", "secateur", "prune", str(dense), str(folder / "out")]
    start = time.perf_counter()
    subprocess.run(
        [*command, "--recipe", str(folder / "recipe.json"), "--quiet"], check=True, stdout=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - start
    found = json.loads((folder / "out" / "result.json").read_text(encoding="utf-8"))
    print(f"{num_bytes / 1e9:.2f} GB of weights, {asked['calibration']}, on {found['device']}: {seconds:.1f} s")
    print(f"stages, s: {found['seconds']}; device peak: {found['device_peak_bytes']} bytes")
    needs = {kind: work[kind] / rate[kind] for kind in work}
    # The model is read, the result written and read again by the check.
    needs["disk"] = (num_bytes + 2 * found["pruned_size"]["num_bytes"]) / (options.disk_gbps * 1e9)
    for kind, needed in needs.items():
        at = f"{work[kind] / 1e12:.2f} T operations at {rate[kind] / 1e12:.2f} T/s" if kind in work else "bytes"
        print(f"roofline, {kind}: {needed:.2f} s ({at})")
    print(f"roofline, all: {sum(needs.values()):.1f} s; measured over it {seconds / sum(needs.values()):.2f}")
    print(f"mark on one H100: at most {MARK_SECONDS:.0f} s: {'met' if seconds <= MARK_SECONDS else 'missed'}")


if __name__ == "__main__":
    main()
