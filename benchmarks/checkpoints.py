"""Well-known checkpoints: parameters as published and as `inspect` counts them, and what a fifth less leaves.

    python benchmarks/checkpoints.py [--only NAME ...] [--page docs/families.md]

Each file of `tests/model/public_configs/` has the sizes that a checkpoint's config says, and the total that its
publisher or the hub states. `config_from` and `num_params_from` say in which public repository and file they were
found; without them they are from memory. `num_params_with` names what the total has and transformers leaves aside.
No weight is read. `--page` writes the table into the page, between its two marks; with `--only`, the other rows stay.
About four minutes of one core.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

import secateur
from secateur.model.checkpoint import meta_model

CONFIGS = Path(__file__).parents[1] / "tests" / "model" / "public_configs"
MARKS = "<!-- checkpoints: made by benchmarks/checkpoints.py -->", "<!-- end of checkpoints -->"
SHARE = 0.2
TITLES = ("checkpoint", "`model_type`", "published", "counted", "off by", "a fifth less", "what goes")


def in_billions(count: float) -> str:
    """Return a number of parameters in three digits."""
    return f"{count / 1e9:.{max(0, 3 - len(str(int(count / 1e9))))}f}B"


def source(text: str | None) -> str:
    """Return where a fact was found in a word: a repository without its owner, a site, or how it is known."""
    if text is None:
        return "memory"
    first = text.removeprefix("https://").split()[0]
    if text.startswith("https://"):
        return first.split("/")[0]
    return first.split("/")[1] if "/" in first else "quoted"


def row(name: str, facts: dict[str, Any]) -> list[str]:
    """Return what the checkpoint's row of the table says, but for its sources."""
    values = dict(facts["config"])
    model_type = values.pop("model_type")
    config = CONFIG_MAPPING[model_type](**values)
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        try:
            found = secateur.inspect(directory, {"remove": {"share": SHARE}})
        except secateur.SecateurError as error:
            counted, left, widths = (
                meta_model(config).num_parameters(),
                "",
                f"nothing: {error}".split("; ")[0].rstrip("."),
            )
        else:
            counted, left = found.size.num_params, in_billions(found.num_params_after)
            widths = ", ".join(f"{each.name} {each.num_units} -> {each.num_keep}" for each in found.groups)
    published = facts["num_params"]
    off = f"{counted / published - 1:+.1%}"
    if "num_params_with" in facts:
        off += f" without {facts['num_params_with']}"
    return [name, f"`{model_type}`", in_billions(published), in_billions(counted), off, left, widths]


def rows_in(page: str) -> dict[str, list[str]]:
    """Return the rows of the table that a page has."""
    section = page.partition(MARKS[0])[2].partition(MARKS[1])[0]
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in section.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[: len(TITLES)] for cells in rows[1:]}


def main() -> int:
    """Print the table, and write it into the page."""
    parser = argparse.ArgumentParser(description="Inspect the configs of well-known checkpoints.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    known = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in CONFIGS.rglob("*.json")}
    page = options.page.read_text(encoding="utf-8") if options.page else ""
    kept = rows_in(page) if options.only else {}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    runs = ", in several runs" if options.only else ""
    lines = [f"Made with transformers {transformers.__version__} at {commit.stdout.strip()}{runs}.", ""]
    lines.append(f"| {' | '.join(TITLES)} | config from | published by |")
    lines.append("|---" * (len(TITLES) + 2) + "|")
    for name, facts in sorted(known.items(), key=lambda item: item[1]["num_params"]):
        is_tried = name in options.only or not options.only
        if not is_tried and name not in kept:
            continue
        cells = row(name, facts) if is_tried else kept[name]
        cells += source(facts.get("config_from")), source(facts.get("num_params_from"))
        lines.append(f"| {' | '.join(cells)} |")
        if is_tried:
            print(lines[-1], flush=True)
    if options.page:
        before, rest = page.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        options.page.write_text(before + "\n".join([MARKS[0], "", *lines, "", MARKS[1]]) + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
