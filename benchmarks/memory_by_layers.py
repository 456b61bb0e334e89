"""Peak anonymous memory of a prune with its weights on disk, by layers: it should not grow.

Random models of one shape (`make_shape.py`) and several numbers of layers lose a fifth of their FFN
channels, each in a process of its own, with the smallest memory budget that works. Resident
anonymous memory is sampled, less what interpreter, libraries and a warm-up run hold. Page cache is
printed beside it.

    python benchmarks/memory_by_layers.py [--layers 4 8 16 32] [--shape qwen2.5-0.5b]
                                          [--num-tokens 2048]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cost import measure_memory
from make_shape import SHAPES, write_shape

from secateur.evaluation.inspect import inspect
from secateur.facts import Size
from secateur.model.checkpoint import meta_model, open_checkpoint
from secateur.recipe_file import parse_recipe

SHARE_OF_FFN = 0.2


def settings(directory: Path, num_tokens: int) -> dict[str, Any]:
    """Return the recipe without a memory budget."""
    config = open_checkpoint(directory).config
    in_ffn = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    share = SHARE_OF_FFN * in_ffn / Size.of(meta_model(config)).num_params
    calibration = {"num_tokens": num_tokens, "sequence_length": 128}
    return {"remove": {"share": share, "depth": 0, "align": 64}, "calibration": calibration}


def measured(directory: Path, num_tokens: int) -> dict[str, int]:
    """Return the peak in bytes, measured in a fresh process."""
    child = [sys.executable, __file__, "--memory-of", str(directory), "--num-tokens", str(num_tokens)]
    return json.loads(subprocess.run(child, capture_output=True, text=True, check=True).stdout)


def smallest_budget(directory: Path, asked: dict[str, Any]) -> str:
    """Return the least budget with which `inspect` says that weights on disk work."""
    for exponent in range(20, 50):
        budget = f"{2**exponent / 1e6:.3f}MB"
        try:
            if inspect(directory, parse_recipe({**asked, "machine": {"memory_budget": budget}})).weights_on_disk:
                return budget
        except ValueError:
            continue
    raise AssertionError("weights fit wherever the rest does: the model is too small for this measurement")


def main() -> None:
    """Print a line per number of layers, and the largest peak over the smallest with the mark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--num-tokens", type=int, default=2048)
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        asked = settings(options.memory_of, options.num_tokens)
        budget = smallest_budget(options.memory_of, asked)
        print(json.dumps(measure_memory(options.memory_of, {**asked, "machine": {"memory_budget": budget}})))
        return
    peaks = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "shape"
            write_shape(options.shape, directory, layers)
            found = measured(directory, options.num_tokens)
        peaks.append(found["RssAnon"] - found["start_anonymous"])
        print(f"{layers} layers: anonymous {peaks[-1] / 1e6:.1f} MB, mapped files {found['RssFile'] / 1e6:.1f} MB")
    print(f"largest over smallest: {max(peaks) / min(peaks):.3f} (mark: at most 1.05)")


if __name__ == "__main__":
    main()
