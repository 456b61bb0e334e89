"""Methods as published beside secateur: equal total parameters, equal tokens, the same judges.

Needs the development text (benchmarks/text.py fetches it; or SECATEUR_DATA) and the rows of the tasks
(`python benchmarks/task_rows.py ../shared/data/tasks`). Each draw takes new calibration text and new held-out text
of six domains; the questions stay. Every finished row is a line of `OUT/rows.jsonl`, so a run goes on
where it stopped; draws come one after another, in each all rows at one share first. Questions come after the text of
all draws, and only in the first `--task-draws` draws: a copy of each model waits in OUT for them.
Models compute in bfloat16. Seconds are the processor's.

    HF_HUB_OFFLINE=1 python benchmarks/published/run.py [--model smollm2-135m] [--shares 0.2 0.3]
        [--draws 3] [--num-tokens 9216] [--tasks hellaswag piqa arc_easy lambada_openai]
        [--limit 40] [--task-draws 1] [--rows dense secateur ...] [--out DIR] [--table]
        [--page docs/results/published.md]
"""

import argparse
import copy
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # of `texts`
import torch
from judge import block_nats, task_scores
from pruned import Pruned, count_parameters
from table import WIKITEXT, markdown, mean
from texts import DATA, HYBRID, text_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import secateur
from secateur.data.pool import Amounts, TextPool
from secateur.data.rows import read_rows
from secateur.evaluation.tasks import TaskOptions, load_tasks
from secateur.model.checkpoint import load_model, load_tokenizer, open_checkpoint
from secateur.recipe import Calibration, Domain

LENGTH, ALIGN, LINES = 512, 8, "rows.jsonl"
BEGIN, END = "<!-- tables: run.py --page -->", "<!-- end of tables -->"
TASKS = ("hellaswag", "piqa", "arc_easy", "lambada_openai")

# Recipes of the product's own rows. `-ls`: a published score with our least squares.
RECIPES: dict[str, dict[str, Any]] = {
    "secateur": {},
    "flap-ls": {"choose": {"score": "flap", "domain_weighting": "tokens"}},
    "wanda-ls": {"choose": {"score": "wanda", "domain_weighting": "tokens"}},
    "best": {"preset": "best"},
}
MODULES = ("flap", "wanda_sp", "llm_pruner", "gisp", "slicegpt", "slicegpt_tied", "two_ssp", "shortgpt", "paper")
ROWS = ("dense", *RECIPES, *MODULES)
DEFAULT_ROWS = tuple(row for row in ROWS if row != "best")


def domains_of(part: int) -> dict[str, Domain]:
    """Return the six domains: part 0 to calibrate on, 1 to be judged by."""
    return {name: Domain(files=(text_file(name, part),)) for name in HYBRID}


def drawn(part: int, num_tokens: int, tokenizer: PreTrainedTokenizerBase, draw: int) -> Any:
    """Return a calibration set as the product draws it."""
    calibration = Calibration(domains=domains_of(part), sequence_length=LENGTH)
    return TextPool(calibration, tokenizer, draw).split(calibration, Amounts(num_tokens=num_tokens)).learning.text


def by_recipe(row: str, share: float, draw: int, arguments: argparse.Namespace, dense: Any) -> Pruned:
    """Prune by the product, which draws the same text itself and holds a part of it out."""
    model, tokenizer = dense
    recipe = RECIPES[row] | {
        "remove": {"share": share, "align": ALIGN, "depth": 0},
        "seed": draw,
        "calibration": {
            "domains": {name: {"files": list(domain.files or ())} for name, domain in domains_of(0).items()},
            "num_tokens": arguments.num_tokens,
            "sequence_length": LENGTH,
        },
        "output": {"evaluate": False},
        "polish": False,
    }
    result = secateur.prune(model, recipe, tokenizer=tokenizer)
    notes = f"calibration {result.summary.calibration.content_hash}"  # Equal to the line's own: the same text.
    return Pruned(result.model, count_parameters(result.model), "least squares, half the drift, guard", notes)


def as_published(row: str, share: float, draw: int, blocks_NT: Tensor, model: PreTrainedModel) -> Pruned:
    """Prune by a published method; its matrices are multiplied in bfloat16, all else in float32."""
    prune: Callable[..., Pruned] = importlib.import_module(row).prune
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pruned = prune(model.float(), blocks_NT, share, draw)
    pruned.model.to(torch.bfloat16).eval()
    return pruned


def text_of(draw: int, tokenizer: Any, config: Any, arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Return one draw's blocks to be judged by; WikiText-2's are spread evenly over the test split."""
    drawn_set = drawn(1, arguments.eval_blocks * len(HYBRID) * LENGTH, tokenizer, draw)
    length = min(config.max_position_embeddings, 2048)
    rows = [row["text"] for _, row in read_rows(DATA / "wikitext2_test_rows.jsonl.gz")]
    ids_T = torch.tensor(tokenizer("\n\n".join(rows), verbose=False)["input_ids"])
    whole = ids_T[: len(ids_T) // length * length].view(-1, length)
    step = max(1, len(whole) // arguments.wikitext_blocks)
    some = whole[draw % step :: step][: arguments.wikitext_blocks]
    return {domain.name: domain.calibration.ids_NT for domain in drawn_set.domains} | {WIKITEXT: some}


def pruned_by(row: str, share: float, draw: int, arguments: argparse.Namespace, dense: Any) -> tuple[Pruned, dict]:
    """Return what a row leaves of the dense model, and the facts about it."""
    model, tokenizer, blocks_NT = copy.deepcopy(dense[0]), *dense[1:]
    total, start = count_parameters(model), time.process_time()
    if row == "dense":
        pruned = Pruned(model, total, "none", "")
    elif row in RECIPES:
        pruned = by_recipe(row, share, draw, arguments, (model, tokenizer))
    else:
        pruned = as_published(row, share, draw, blocks_NT, model)
    seconds = time.process_time() - start
    removed = 1 - pruned.num_parameters / total
    return pruned, {"removed": removed, "repair": pruned.repair, "notes": pruned.notes, "prune_seconds": seconds}


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a row depends on besides its name, share and draw."""
    names = ("model", "num_tokens", "eval_blocks", "wikitext_blocks", "limit", "tasks")
    return {name: getattr(arguments, name) for name in names}


def run_all(arguments: argparse.Namespace) -> None:
    """Judge every row that OUT does not hold yet: by text draw by draw, then by the tasks."""
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(arguments.model)
    model, tokenizer = load_model(checkpoint).to(torch.bfloat16), load_tokenizer(checkpoint)
    rows = [(row, share) for share in arguments.shares for row in arguments.rows if row != "dense"]
    rows = [("dense", 0.0)] * ("dense" in arguments.rows) + rows
    for draw in range(arguments.from_draw, arguments.draws):
        judge_by_text(rows, draw, model, tokenizer, arguments)
    if not arguments.task_draws:
        return
    loaded = load_tasks(tuple(arguments.tasks), TaskOptions(limit=arguments.limit), DATA / "tasks")
    for draw in range(arguments.from_draw, min(arguments.task_draws, arguments.draws)):
        for row, share in missing(rows, draw, "tasks", arguments):
            file = kept_model(row, share, draw, arguments)
            if file.exists():  # Else the row failed.
                judged = torch.load(file, weights_only=False)  # Our own file: it holds modules of ours.
                scores = task_scores(judged, tokenizer, loaded, arguments.limit)
                add_line(row, share, draw, "tasks", {"tasks": scores}, arguments)
                file.unlink()
                print(f"draw {draw} {row} {share}: asked {', '.join(scores)}", flush=True)


def judge_by_text(
    rows: list[tuple[str, float]], draw: int, model: Any, tokenizer: Any, arguments: argparse.Namespace
) -> None:
    """Prune by each row and write what its text says; a row that fails is named, the others go on."""
    text = drawn(0, arguments.num_tokens, tokenizer, draw)
    # All that was drawn: the product holds its part out for the guard, a published method has no guard.
    blocks_NT = torch.cat([torch.cat([each.calibration.ids_NT, each.held_out.ids_NT]) for each in text.domains])
    order = torch.randperm(len(blocks_NT), generator=torch.Generator().manual_seed(draw))
    judged_by = text_of(draw, tokenizer, model.config, arguments)
    counts: dict[str, Any] = {"calibration_tokens": text.num_tokens, "held_out_tokens": text.num_held_out_tokens}
    counts["calibration"] = text.content_hash
    for row, share in missing(rows, draw, "text", arguments):
        try:
            pruned, facts = pruned_by(row, share, draw, arguments, (model, tokenizer, blocks_NT[order]))
            facts["nats"] = {name: block_nats(pruned.model, blocks) for name, blocks in judged_by.items()}
        except Exception:
            print(f"draw {draw} {row} {share}: FAILED\n{traceback.format_exc()}", flush=True)
            continue
        if draw < arguments.task_draws:
            torch.save(pruned.model, kept_model(row, share, draw, arguments))
        add_line(row, share, draw, "text", facts | counts, arguments)
        nats = mean([mean(values) for name, values in facts["nats"].items() if name != WIKITEXT])
        took = f"{facts['prune_seconds']:.0f} s"
        print(f"draw {draw} {row} {share}: removed {facts['removed']:.4f}, {nats:.4f} nats, {took}", flush=True)


def kept_model(row: str, share: float, draw: int, arguments: argparse.Namespace) -> Path:
    """Return where a model waits for the tasks."""
    return arguments.out / f"{row}-{share}-{draw}.pt"


def key_of(row: str, share: float, draw: int, part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a finished line is found by."""
    return {"row": row, "share": share, "draw": draw, "part": part, "settings": settings_of(arguments)}


def missing(
    rows: list[tuple[str, float]], draw: int, part: str, arguments: argparse.Namespace
) -> Iterator[tuple[str, float]]:
    """Yield the rows without a finished line, each looked for when its turn comes."""
    for row, share in rows:
        key = key_of(row, share, draw, part, arguments)
        if not any(key.items() <= line.items() for line in read_lines(arguments.out)):
            yield row, share


def add_line(
    row: str, share: float, draw: int, part: str, facts: dict[str, Any], arguments: argparse.Namespace
) -> None:
    """Append a finished row."""
    with (arguments.out / LINES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(key_of(row, share, draw, part, arguments) | facts) + "\n")


def read_lines(out: Path) -> list[dict[str, Any]]:
    """Return the finished lines; none if there is no file of them. A torn last line is left out."""
    if not (out / LINES).exists():
        return []
    lines = (out / LINES).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def write_into(page: Path, tables: str) -> None:
    """Put the tables between the page's comments BEGIN and END; the rest stays."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Run what is missing, or only print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--from-draw", type=int, default=0, help="two processes may share OUT, each with other draws")
    parser.add_argument("--num-tokens", type=int, default=9216)
    parser.add_argument("--eval-blocks", type=int, default=2, help="of each domain, of 512 tokens")
    parser.add_argument("--wikitext-blocks", type=int, default=1, help="of 2,048 tokens")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--limit", type=int, default=40, help="questions per task")
    parser.add_argument("--task-draws", type=int, default=1, help="draws in which questions are asked")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(DEFAULT_ROWS))
    parser.add_argument("--out", type=Path, default=Path("published"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--page", type=Path, help="a Markdown page; the tables go between its two comments")
    arguments = parser.parse_args()
    if not arguments.table:
        run_all(arguments)
    tables = markdown(read_lines(arguments.out))
    print(tables)
    if arguments.page:
        write_into(arguments.page, tables)


if __name__ == "__main__":
    main()
