"""Writing a recovered model: the checkpoint, what the pruned directory said, and what the recovery adds to it.

In: the recovered model, the directory of the pruned one, the record and log lines. Out: files in an existing
directory. `evaluation.json` of the pruned model is not carried: it no longer holds.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.measured import BENCH_FILE
from secateur.output import save_checkpoint
from secateur.recipe import Recipe, dump_recipe
from secateur.recover_record import RECOVERY_FILE, RecoveryRecord
from secateur.recover_table import recovery_card
from secateur.runlog import LOG_FILE
from secateur.summary import RESULT_FILE

# What stays true of the model: which units it has, how it was pruned, how fast it is.
CARRIED = ("keep.json", RESULT_FILE, BENCH_FILE)
CARD, HOW_MADE = "README.md", "\n## How it was made\n"


def save_recovered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, source: Path, directory: Path
) -> None:
    """Write weights, configs, tokenizer, the recipe, and what is carried over from `source`."""
    save_checkpoint(model, tokenizer, directory, max_shard_size=recipe.max_shard_size, carry_from=source)
    (directory / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def write_record(record: RecoveryRecord, lines: Iterable[dict[str, Any]], source: Path, directory: Path) -> None:
    """Write recovery.json, continue the run log, and add to the model card."""
    (directory / RECOVERY_FILE).write_text(record.to_json(), encoding="utf-8")
    log = source / LOG_FILE
    earlier = log.read_text(encoding="utf-8") if log.is_file() else ""
    added = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / LOG_FILE).write_text(earlier + added, encoding="utf-8")
    card = source / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {record.pruned}, recovered by secateur\n"
    before, heading, after = text.partition(HOW_MADE)
    (directory / CARD).write_text(f"{before.rstrip()}\n\n{recovery_card(record)}{heading}{after}", encoding="utf-8")


def last_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines without those that a restart wrote again: of one event and place the last one counts."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        key = (line["event"], line.get("step"), line.get("text"))
        found[key] = line
    return list(found.values())
