"""What training wins back: SmolLM2-135M without 20, 30 and 50% of its parameters, then recovered.

Needs the development text (benchmarks/text.py fetches it; or SECATEUR_DATA).
Prunes by the defaults without polish and trains
on the `*_calib` files of six domains; evaluates on 4 blocks of 512 of each `*_eval` file. Rows: the
defaults (`ours`), KL or cross-entropy alone, embedding and head trained too (`full`), and, at equal
tokens, LoRA on the same loss, on KL or on cross-entropy (LLM-Pruner's recipe). Finished models stay
in the directory, so that an interrupted benchmark goes on. Prints a Markdown table.

    python benchmarks/recover.py DIRECTORY [--model smollm2-135m] [--removes 0.2 0.3 0.5]
                                 [--tokens 300000] [--rows ours lora-ce]
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from quality import LENGTH, draw
from texts import HYBRID, text_file

from secateur import recover
from secateur.api import prune
from secateur.model.bind import bind
from secateur.model.checkpoint import load, load_tokenizer, open_checkpoint
from secateur.stream.losses import domain_losses

CALIBRATION_TOKENS, EVALUATION_BLOCKS = 49_152, 4
ROWS: dict[str, dict[str, Any]] = {
    "ours": {},
    "kl": {"kl_share": 1.0},
    "ce": {"kl_share": 0.0},
    "full": {"train": "full"},
    "lora": {"train": "lora", "learning_rate": 2e-4},
    "lora-kl": {"train": "lora", "kl_share": 1.0, "learning_rate": 2e-4},
    "lora-ce": {"train": "lora", "kl_share": 0.0, "learning_rate": 2e-4},
}


def domains() -> dict[str, Any]:
    """Return the six domains of the recipe."""
    return {name: {"files": [text_file(name, 0)]} for name in HYBRID}


def pruned_at(remove: float, model: str, place: Path) -> Path:
    """Prune by the defaults, unless an earlier run did."""
    out = place / f"pruned-{remove:g}"
    if not out.exists():
        calibration = {"domains": domains(), "num_tokens": CALIBRATION_TOKENS, "sequence_length": LENGTH}
        prune(model, {"remove": remove, "calibration": calibration, "polish": False}, out=out)
    return out


def recovered_by(row: str, pruned: Path, model: str, num_tokens: int, learning_rate: float | None) -> Path:
    """Recover by one row's settings, unless an earlier run did."""
    rate = "" if learning_rate is None else f"-{learning_rate:g}"
    out = pruned.with_name(f"{pruned.name}-{row}-{num_tokens}{rate}")
    if not out.exists():
        settings = {"num_tokens": num_tokens, **ROWS[row]}
        if learning_rate is not None:
            settings["learning_rate"] = learning_rate
        recover(pruned, model, {"recover": settings}, out=out, tell=lambda text: print(f"  {text}", flush=True))
    return out


def nats(reference: str | Path, blocks: dict[str, Any]) -> float:
    """Return the mean over domains of nats per token on the evaluation text."""
    model = load(reference)
    losses = domain_losses(model, bind(model), blocks)
    return sum(loss.nats_per_token for loss in losses.values()) / len(losses)


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--removes", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--learning-rate", type=float, help="instead of the row's")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["ours", "lora-ce"])
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(open_checkpoint(options.model))
    evaluation = draw(HYBRID, 1, EVALUATION_BLOCKS, tokenizer, 0)
    blocks = {domain.name: domain.calibration.ids_NT for domain in evaluation.domains}
    dense = nats(options.model, blocks)
    print(f"dense: geometric-mean perplexity {math.exp(dense):.2f}, {options.tokens:,} tokens at most\n")
    print("| removed | row | perplexity | lost nats/token | won back | on its own held-out text | s |")
    print("|---:|---|---:|---:|---:|---|---:|")
    for remove in options.removes:
        pruned = pruned_at(remove, options.model, options.directory)
        lost = nats(pruned, blocks) - dense
        print(f"| {remove:.0%} | pruned | {math.exp(dense + lost):.2f} | {lost:.3f} | | | |", flush=True)
        for row in options.rows:
            out = recovered_by(row, pruned, options.model, options.tokens, options.learning_rate)
            left = nats(out, blocks) - dense
            record = json.loads((out / "recovery.json").read_text(encoding="utf-8"))
            cells = f"{math.exp(dense + left):.2f} | {left:.3f} | {1 - left / lost:.1%} | {by_record(record)}"
            print(f"| {remove:.0%} | {row} | {cells} | {record['training']['seconds']:.0f} |", flush=True)


def by_record(record: dict[str, Any]) -> str:
    """Return the share that training won back on its own held-out text."""

    def mean(verdicts: dict[str, Any]) -> float:
        return sum(verdict["nats_per_token"] for verdict in verdicts.values()) / len(verdicts)

    dense, before, after = mean(record["dense"]), mean(record["before"]), mean(record["training"]["after"])
    return f"{(before - after) / (before - dense):.1%}"


if __name__ == "__main__":
    main()
