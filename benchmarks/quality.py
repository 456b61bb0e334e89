"""Perplexity without 30% of every FFN's channels: scores, compensation, budgets, domains.

Needs the development text (benchmarks/text.py fetches it; or SECATEUR_DATA). Calibrates on 6 x 6 blocks of 512
tokens of the `*_calib` files, evaluates on 4 blocks of 512 of each `*_eval` file. Single-domain
rows calibrate on as many tokens. One more block per domain is held out of all statistics. Prints a
Markdown table per seed and the marks. `--remove`: a share of all parameters, instead of `--share`.

    python benchmarks/quality.py [--seeds 0 1 2] [--rows ours curve] [--model smollm2-135m]
                                 [--share 0.3] [--remove 0.3] [--num-blocks 6]
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from dense import write_dense
from texts import HYBRID, text_file
from transformers import AutoTokenizer

from secateur.data.blocks import LearningText
from secateur.data.pool import Amounts, TextPool
from secateur.facts import Size
from secateur.model.bind import bind
from secateur.model.checkpoint import Checkpoint, load_model, open_checkpoint
from secateur.pruning.cut import remove_depth
from secateur.pruning.loop import prune_together
from secateur.pruning.open import open_model
from secateur.pruning.resolve import checked, resolve
from secateur.pruning.run import Run
from secateur.recipe import Calibration, Domain, merged, parse_recipe
from secateur.store import Services
from secateur.stream.losses import domain_losses


class Cut(NamedTuple):
    """`share`: of all FFN channels. `num_blocks`: of calibration, per domain.

    `remove`: a share of all parameters, instead of `share`.
    """

    share: float
    num_blocks: int
    remove: float | None = None


LENGTH, CALIBRATION_BLOCKS, EVALUATION_BLOCKS, CUT_SHARE = 512, 6, 4, 0.30
MAX_TIMES_DENSE = 1.73
CURVE = {"budget": "curve"}

ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "ours": ({}, HYBRID),
    "ours-tokens": ({"choose": {"domain_weighting": "tokens"}}, HYBRID),
    "ours-web": ({}, ("web",)),
    "ours-wiki": ({}, ("wiki",)),
    **{
        f"{score}{'' if compensate == 'none' else '-ls'}": (
            {"choose": {"score": score}, "repair": {"compensate": compensate}},
            HYBRID,
        )
        for score in ("random", "magnitude", "wanda", "flap", "obs")
        for compensate in ("none", "least_squares")
        if (score, compensate) != ("obs", "least_squares")
    },
    "ours-own-target": ({"repair": {"target_mix": 0.0}}, HYBRID),
    "ours-own-damping-10": ({"repair": {"target_mix": 0.0, "damping": 0.01}}, HYBRID),
    "ours-3-rounds": ({"choose": {"rounds": 3}}, HYBRID),
    "curve": ({"choose": CURVE, "remove": {"align": 32}}, HYBRID),
    **{f"depth-{depth}": ({"choose": CURVE, "remove": {"align": 32, "depth": depth}}, HYBRID) for depth in (1, 2, 3)},
    "curve-kv": ({"choose": CURVE, "remove": {"align": 32, "groups": ["ffn", "kv_heads"]}}, HYBRID),
    "minimax": ({"choose": {"domain_weighting": "minimax"}}, HYBRID),
}


def draw(domains: tuple[str, ...], part: int, blocks: int, tokenizer: Any, seed: int) -> LearningText:
    """Return 6 x `blocks` blocks, spread over `domains`, of part 0 (calib) or 1 (eval)."""
    files = {name: Domain(files=(text_file(name, part),)) for name in domains}
    calibration = Calibration(domains=files, sequence_length=LENGTH)
    amounts = Amounts(num_tokens=blocks * len(HYBRID) * LENGTH)
    return TextPool(calibration, tokenizer, seed).split(calibration, amounts).learning.text


def run_row(
    checkpoint: Checkpoint, row: str, seed: int, tokenizer: Any, evaluation: LearningText, size: Cut
) -> dict[str, float]:
    """Prune by one row's recipe; return perplexity by domain. Empty `row`: the dense model."""
    model = load_model(checkpoint)
    arch, num_params = bind(model), Size.of(model).num_params
    seconds = 0.0
    if row:
        settings, domains = ROWS[row]
        channels = sum(group.num_units * group.params_per_unit for group in arch.select(("ffn",)))
        remove = size.remove or size.share * channels / num_params
        calibration = {"num_tokens": size.num_blocks * len(HYBRID) * LENGTH, "sequence_length": LENGTH}
        base = {"remove": {"share": remove, "align": 1}, "calibration": calibration, "seed": seed}
        resolved = resolve(checked(open_model(model, parse_recipe(merged(base, settings)), tokenizer)))
        calibration = draw(domains, 0, size.num_blocks, tokenizer, seed)
        start = time.perf_counter()
        run = remove_depth(Run(model=model, arch=arch, resolved=resolved, text=calibration, services=Services()))
        prune_together([run])
        arch, seconds = run.arch, time.perf_counter() - start
    blocks = {domain.name: domain.calibration.ids_NT for domain in evaluation.domains}
    losses = domain_losses(model, arch, blocks)
    perplexities = {name: min(loss.nats_per_token, 700.0) for name, loss in losses.items()}
    geometric = sum(perplexities.values()) / len(perplexities)
    return {name: math.exp(nats) for name, nats in perplexities.items()} | {
        "geometric mean": math.exp(geometric),
        "seconds": seconds,
    }


def show(row: str, found: dict[str, float], dense: dict[str, float]) -> None:
    """Print one Markdown row."""
    cells = [f"{found[name]:.4g}" for name in (*HYBRID, "geometric mean")]
    ratio = f"{found['geometric mean'] / dense['geometric mean']:.3f}"
    print(f"| {row} | " + " | ".join([*cells, ratio, f"{found['seconds']:.0f}"]) + " |", flush=True)


def main() -> None:
    """Run the rows for every seed and print tables and marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--share", type=float, default=CUT_SHARE)
    parser.add_argument("--remove", type=float)
    parser.add_argument("--num-blocks", type=int, default=CALIBRATION_BLOCKS)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # As safetensors, of which each row loads a fresh copy in a second.
        dense = open_checkpoint(str(write_dense(options.model, Path(folder))))
        run_all(dense, options.seeds, options.rows, Cut(options.share, options.num_blocks, options.remove))


def run_all(checkpoint: Checkpoint, seeds: list[int], rows: list[str], size: Cut) -> None:
    """Print a table per seed, then the marks over seeds."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    times_dense = []
    for seed in seeds:
        evaluation = draw(HYBRID, 1, EVALUATION_BLOCKS, tokenizer, seed)
        print(f"\nseed {seed}, calibration and evaluation drawn anew; evaluation hash {evaluation.content_hash[:16]}\n")
        print("| row | " + " | ".join([*HYBRID, "geometric mean", "x dense", "s"]) + " |")
        print("|---|" + "---:|" * (len(HYBRID) + 3))
        dense = run_row(checkpoint, "", seed, tokenizer, evaluation, size)
        show("dense", dense, dense)
        means = {}
        for row in rows:
            found = run_row(checkpoint, row, seed, tokenizer, evaluation, size)
            show(row, found, dense)
            means[row] = found["geometric mean"]
        if "ours" in means:
            times_dense.append(means["ours"] / dense["geometric mean"])
    if times_dense:
        each = ", ".join(f"{value:.3f}" for value in times_dense)
        print(f"\nours over dense: {each}; mean {statistics.mean(times_dense):.3f} (mark: at most {MAX_TIMES_DENSE})")


if __name__ == "__main__":
    main()
