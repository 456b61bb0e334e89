"""Seconds of a prune on one GPU (or another device).

A random model of a known shape (`make_shape.py`) is pruned by `secateur prune` in a process of its
own; load, save and reload check count. The mark is for one H100 and this script's defaults.

    python benchmarks/gpu.py [--device cuda] [--shape qwen2.5-7b] [--layers 28] [--num-blocks 128]
                             [--sequence-length 2048] [--remove 0.2] [--folder DIR] [--dense DIR]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from make_shape import SHAPES, write_shape

MARK_SECONDS = 90.0


def main() -> None:
    """Write the shape unless a model is given, then run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--num-blocks", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--remove", type=float, default=0.2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--dense", type=Path, help="a local model, instead of a shape")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="gpu-") as name:
        folder = Path(name)
        if options.dense is None:
            write_shape(options.shape, folder / "dense", options.layers)
        run(options.dense or folder / "dense", folder, options)


def run(dense: Path, folder: Path, options: argparse.Namespace) -> None:
    """Prune once; print seconds by stage, and the mark."""
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
    command = [sys.executable, "-m", "secateur", "prune", str(dense), str(folder / "out")]
    start = time.perf_counter()
    subprocess.run([*command, "--recipe", str(folder / "recipe.json")], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    found = json.loads((folder / "out" / "result.json").read_text(encoding="utf-8"))
    num_bytes = found["dense_size"]["num_bytes"]
    print(f"{num_bytes / 1e9:.2f} GB of weights, {asked['calibration']}, on {found['device']}: {seconds:.1f} s")
    print(f"stages, s: {found['seconds']}; device peak: {found['device_peak_bytes']} bytes")
    print(f"mark on one H100: at most {MARK_SECONDS:.0f} s: {'met' if seconds <= MARK_SECONDS else 'missed'}")


if __name__ == "__main__":
    main()
