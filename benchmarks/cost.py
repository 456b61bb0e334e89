"""Cost of one round: seconds relative to a plain forward, memory relative to the checkpoint.

Three things alternate in one process, each on a fresh copy of the model: a forward, a round with
`target_mix: 0` (one walk), and a round of the defaults (which also follow the dense stream).
Medians are printed. The mark was set for `target_mix: 0`; the defaults spend more, on quality.

Memory is that of the defaults, measured in a process of its own that calls `secateur.prune` from a
safetensors directory to a finished output, evaluation included. It is sampled resident memory, less
what interpreter and libraries hold after a tiny random model was pruned.

    python benchmarks/cost.py [--model smollm2-135m] [--num-tokens 18432] [--repeats 3]
                              [--rows quick defaults best]
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
from secateur.data.blocks import LearningText
from secateur.data.pool import Amounts, TextPool
from secateur.facts import Size
from secateur.formats.save import save_checkpoint
from secateur.model.checkpoint import load_model, load_tokenizer, open_checkpoint
from secateur.pruning.loop import prune_together
from secateur.pruning.open import open_model
from secateur.pruning.resolve import Resolved, checked, resolve
from secateur.pruning.run import Run
from secateur.recipe import parse_recipe
from secateur.store import Services
from secateur.stream.device import release_freed
from secateur.stream.walk import make_batches

MAX_RATIO, MAX_MEMORY = 3.0, 1.25
OWN_TARGET = "own target"
ROWS: dict[str, dict[str, Any]] = {
    OWN_TARGET: {"repair": {"target_mix": 0}},
    "defaults": {},
    "quick": {"preset": "quick"},
    "best": {"preset": "best"},
}
SAMPLE_SECONDS = 0.005


def resident(process: int | str = "self") -> dict[str, int]:
    """Return a process's anonymous and file-backed resident bytes (Linux); 0 once it has ended."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def forward_seconds(model: Any, calibration: LearningText) -> float:
    """Time the model's own forward, logits included, over all calibration and held-out blocks."""
    start = time.perf_counter()
    with torch.inference_mode():
        for domain in calibration.domains:
            for blocks in (domain.calibration.ids_NT, domain.held_out.ids_NT):
                for batch in make_batches(domain.name, blocks, held_out=False):
                    model(batch.ids_BT, use_cache=False)
    return time.perf_counter() - start


def round_seconds(directory: Path, resolved: Resolved, calibration: LearningText) -> float:
    """Time one prune of a fresh copy, loading not included."""
    model = load_model(open_checkpoint(directory))
    start = time.perf_counter()
    prune_together([Run(model=model, arch=resolved.arch, resolved=resolved, text=calibration, services=Services())])
    return time.perf_counter() - start


def warm_up(tokenizer: Any) -> None:
    """Prune a tiny random model, which loads every library before memory is measured."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = {"remove": {"share": 0.0005, "align": 8}, "calibration": {"num_tokens": 6144}, "polish": False}
        secateur.prune(folder, settings, out=Path(folder) / "out")


def measure_memory(directory: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Prune in this process while a thread samples memory; return the peak and the start."""
    warm_up(load_tokenizer(open_checkpoint(directory)))
    gc.collect()
    release_freed()  # else what the warm-up freed may count as held
    before, peak, stop = resident(), {"RssAnon": 0, "RssFile": 0, "sum": 0}, threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            now = resident()
            for name, value in (now | {"sum": sum(now.values())}).items():
                peak[name] = max(peak[name], value)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            secateur.prune(directory, {**settings, "polish": False}, out=Path(folder) / "out")
    finally:
        stop.set()  # also after an error: the thread would run forever
        thread.join()
    return {"start": sum(before.values()), "start_anonymous": before["RssAnon"], **peak}


def main() -> None:
    """Print seconds and memory with their marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num-tokens", type=int, default=18432)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=[OWN_TARGET, "defaults"])
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = {"remove": 0.2, "calibration": {"num_tokens": options.num_tokens}}
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of, settings)))
        return
    opened = open_checkpoint(options.model)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        model, tokenizer = load_model(opened), load_tokenizer(opened)
        save_checkpoint(model, tokenizer, directory, carry_from=None)
        size = Size.of(model)
        dense = open_model(directory, parse_recipe(settings))
        recipes = {name: parse_recipe(settings | ROWS[name]) for name in options.rows}
        resolved = {name: resolve(checked(dense.asking(recipe))) for name, recipe in recipes.items()}
        recipe = resolved[options.rows[0]].recipe
        pool = TextPool(recipe.calibration, tokenizer, recipe.seed)
        calibration = pool.split(recipe.calibration, Amounts(num_tokens=options.num_tokens)).learning.text
        print_seconds(model, directory, resolved, calibration, options.repeats)
        child = [sys.executable, __file__, "--memory-of", str(directory), "--num-tokens", str(options.num_tokens)]
        print_memory(json.loads(subprocess.run(child, capture_output=True, text=True, check=True).stdout), size)


def print_seconds(
    model: Any, directory: Path, resolved: dict[str, Resolved], calibration: LearningText, repeats: int
) -> None:
    """Alternate forward and rounds; print medians relative to the forward."""
    num_tokens = calibration.num_tokens + calibration.num_held_out_tokens
    print(f"{num_tokens:,} tokens in blocks of {calibration.sequence_length}, {torch.get_num_threads()} threads")
    forward_seconds(model, calibration)
    forwards, rounds = [], {name: [] for name in resolved}
    for _ in range(repeats):
        forwards.append(forward_seconds(model, calibration))
        for name, each in resolved.items():
            rounds[name].append(round_seconds(directory, each, calibration))
        print(f"  forward {forwards[-1]:.1f} s", *(f"{name} {rounds[name][-1]:.1f} s" for name in resolved), sep=", ")
    for name in resolved:
        ratio = statistics.median(rounds[name]) / statistics.median(forwards)
        mark = f" (mark: at most {MAX_RATIO})" if name == OWN_TARGET else ""
        print(f"one round, {name}, over one plain forward: {ratio:.2f}{mark}")


def print_memory(found: dict[str, int], size: Size) -> None:
    """Print the peak, also relative to the checkpoint's bytes."""
    used = found["sum"] - found["start"]
    anonymous = found["RssAnon"] - found["start_anonymous"]
    print(
        f"checkpoint {size.num_bytes / 1e6:.1f} MB; interpreter and libraries before it {found['start'] / 1e6:.1f} MB"
    )
    print(f"peak beyond them {used / 1e6:.1f} MB resident, of which anonymous {anonymous / 1e6:.1f} MB")
    print(f"peak over checkpoint: {used / size.num_bytes:.2f} (mark: at most {MAX_MEMORY})")


if __name__ == "__main__":
    main()
