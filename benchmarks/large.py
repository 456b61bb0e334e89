"""Peak memory and seconds of a prune with its weights on disk, beside what `inspect` predicts.

A random model of a known shape (`make_shape.py`) is pruned by `secateur prune` in a process of its
own within `--budget`, reload check included. Anonymous memory of that process and its children is
sampled and summed, less what a process holds that has imported secateur. Later imports and the
process that reloads still count; with small shapes they outweigh the run. Page cache is printed
beside it. `--keep` leaves the dense model and the result on disk.

    python benchmarks/large.py [--shape qwen2.5-7b] [--layers 28] [--remove 0.2]
                               [--num-tokens 384] [--budget 6GB] [--preset fast]
                               [--folder DIR] [--dense DIR] [--keep]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cost import resident
from make_shape import SHAPES, write_shape

from secateur.evaluation.inspect import inspect
from secateur.recipe_file import parse_recipe

SAMPLE_SECONDS = 0.02
PREDICTION_MARK = 0.1


def resident_with_children(process: int) -> dict[str, int]:
    """Return anonymous and file-backed resident bytes of a process and its descendants (Linux)."""
    total = {"RssAnon": 0, "RssFile": 0}
    for pid in (process, *_below(process)):
        try:
            found = resident(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        total = {name: total[name] + found[name] for name in total}
    return total


def _below(process: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text(encoding="utf-8").split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            found += [child, *_below(child)]
    return found


def sampled(command: list[str]) -> tuple[dict[str, int], float]:
    """Run a command; return the peak of each kind of resident memory, and seconds."""
    peak, start = {"RssAnon": 0, "RssFile": 0}, time.perf_counter()
    child = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    while child.poll() is None:
        for name, value in resident_with_children(child.pid).items():
            peak[name] = max(peak[name], value)
        time.sleep(SAMPLE_SECONDS)
    if child.returncode:
        raise SystemExit(f"{command[:4]} ended with {child.returncode}")
    return peak, time.perf_counter() - start


def main() -> None:
    """Print predicted and measured peak with the mark, and seconds by stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--remove", type=float, default=0.2, help="less for few layers, where embeddings weigh more")
    parser.add_argument("--num-tokens", type=int, default=384)
    parser.add_argument("--budget", default="6GB")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--dense", type=Path, help="a local model, instead of a shape")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="large-"))
    try:
        dense, out, recipe = (folder / name for name in ("dense", "out", "recipe.json"))
        if options.dense is None:
            write_shape(options.shape, dense, options.layers)
        dense = options.dense or dense
        asked = {
            "preset": options.preset,
            "remove": {"share": options.remove, "align": 256},
            "machine": {"memory_budget": options.budget},
            "polish": False,
            "calibration": {"num_tokens": options.num_tokens, "sequence_length": 64},
        }
        recipe.write_text(json.dumps(asked), encoding="utf-8")
        found = inspect(dense, parse_recipe(asked))
        imports = "import secateur, secateur.cli, secateur.formats.save, time; time.sleep(2)"
        before, _ = sampled([sys.executable, "-c", imports])
        peak, seconds = sampled(
            [sys.executable, "-m", "secateur", "prune", str(dense), str(out), "--recipe", str(recipe)]
        )
        used, predicted = peak["RssAnon"] - before["RssAnon"], found.memory.peak
        print(f"{found.size.num_bytes / 1e9:.2f} GB of weights, on disk: {found.weights_on_disk}; {seconds:.0f} s")
        print(f"stages, s: {json.loads((out / 'result.json').read_text(encoding='utf-8'))['seconds']}")
        print(
            f"anonymous memory at the peak, beyond {before['RssAnon'] / 1e9:.2f} GB of libraries: {used / 1e9:.2f} GB"
        )
        print(f"mapped files at the peak: {peak['RssFile'] / 1e9:.2f} GB")
        print(f"predicted {predicted / 1e9:.2f} GB; measured over predicted {used / predicted:.3f}")
        print(
            f"mark: within {PREDICTION_MARK:.0%}: {'met' if abs(used / predicted - 1) <= PREDICTION_MARK else 'missed'}"
        )
    finally:
        if options.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
