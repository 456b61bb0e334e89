"""Eight domains against one at equal tokens: seconds and peak memory of a prune.

The two alternate, each on a fresh copy of the model; medians are printed. Seconds are of the
pruning alone. Memory is that of a whole `secateur.prune` in a process of its own, beyond
interpreter and libraries. Both are measured as in `cost.py`. The one domain is `code`. The eight
are seven installed ones and `code` under another name, which draws other documents.

    python benchmarks/domains.py [--model smollm2-135m] [--num-blocks 9] [--repeats 3]
                                 [--weighting energy]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cost import measure_memory, round_seconds
from dense import write_dense

from secateur.data.calibration import build_calibration
from secateur.plugins import TECHNICAL
from secateur.pruning.open import open_model, tokenizer_of
from secateur.pruning.resolve import checked, resolve
from secateur.recipe_file import parse_recipe

LENGTH = 512
SEVEN = (*TECHNICAL, "legal", "dialogue")
EIGHT = {name: {"installed": name} for name in SEVEN} | {"more code": {"installed": "code"}}
SETS = {"one": {"code": {"installed": "code"}}, "eight": EIGHT}
MAX_RATIO = 1.1


def settings_of(domains: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe, with equally many tokens for each set."""
    num_tokens = len(EIGHT) * options.num_blocks * LENGTH
    calibration = {"domains": domains, "num_tokens": num_tokens, "sequence_length": LENGTH}
    return {"remove": 0.2, "choose": {"domain_weighting": options.weighting}, "calibration": calibration}


def seconds_of(directory: Path, settings: dict[str, Any]) -> float:
    """Return the seconds of the pruning, without loading text and model."""
    opened = checked(open_model(directory, parse_recipe(settings)))
    resolved, tokenizer = resolve(opened), tokenizer_of(opened)
    recipe = resolved.recipe
    calibration = build_calibration(recipe.calibration, resolved.num_tokens, tokenizer, recipe.seed)
    print(f"    {calibration.num_tokens:,} tokens and {calibration.num_held_out_tokens:,} held out", flush=True)
    return round_seconds(directory, resolved, calibration)


def memory_of(directory: Path, name: str, options: argparse.Namespace) -> float:
    """Return the peak in bytes, measured in its own process."""
    child = [sys.executable, __file__, "--memory-of", str(directory), "--set", name, "--weighting", options.weighting]
    child += ["--num-blocks", str(options.num_blocks)]
    found = json.loads(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
    return found["sum"] - found["start"]


def main() -> None:
    """Print each run, then eight domains relative to one with the mark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num-blocks", type=int, default=9, help="per domain of eight; a multiple of 9, of which one "
                        "more is held out, so that the held-out text is of equal size too")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weighting", default="energy")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--set", choices=list(SETS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.num_blocks % 9:
        parser.error("--num-blocks must be a multiple of 9")
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of, settings_of(SETS[options.set], options))))
        return
    with tempfile.TemporaryDirectory() as folder:
        run_all(write_dense(options.model, Path(folder)), options)


def run_all(directory: Path, options: argparse.Namespace) -> None:
    """Alternate the sets; print every run and the medians' ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in SETS}
    memory: dict[str, list[float]] = {name: [] for name in SETS}
    for _ in range(options.repeats):
        for name, domains in SETS.items():
            seconds[name].append(seconds_of(directory, settings_of(domains, options)))
            memory[name].append(memory_of(directory, name, options))
            print(f"  {name}: {seconds[name][-1]:.1f} s, peak {memory[name][-1] / 1e6:.1f} MB", flush=True)
    for what, found in (("seconds", seconds), ("peak memory", memory)):
        ratio = statistics.median(found["eight"]) / statistics.median(found["one"])
        print(f"{what}, eight domains over one: {ratio:.3f} (mark: at most {MAX_RATIO})")


if __name__ == "__main__":
    main()
