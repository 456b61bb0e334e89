"""Well-known checkpoints: parameters as published and as `inspect` counts them, and what a fifth less leaves.

    python benchmarks/checkpoints.py [--only NAME ...] [--page docs/families.md]

Each file of `tests/model/public_configs/` has the sizes that a checkpoint's config says, and the total that its
publisher or the hub states; both were written from public facts. No weight is read. `--page` writes the table into
the page, between its two marks. About four minutes of one core.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

import secateur

CONFIGS = Path(__file__).parents[1] / "tests" / "model" / "public_configs"
MARKS = "<!-- checkpoints: made by benchmarks/checkpoints.py -->", "<!-- end of checkpoints -->"
SHARE = 0.2


def in_billions(count: float) -> str:
    """Return a number of parameters in three digits."""
    return f"{count / 1e9:.{max(0, 3 - len(str(int(count / 1e9))))}f}B"


def row(name: str, facts: dict[str, Any]) -> str:
    """Return the checkpoint's row of the table."""
    config = dict(facts["config"])
    model_type = config.pop("model_type")
    with tempfile.TemporaryDirectory() as directory:
        CONFIG_MAPPING[model_type](**config).save_pretrained(directory)
        found = secateur.inspect(directory, {"remove": {"share": SHARE}})
    published, counted, left = facts["num_params"], found.size.num_params, found.num_params_after
    widths = ", ".join(f"{each.name} {each.num_units} -> {each.num_keep}" for each in found.groups)
    numbers = f"{in_billions(published)} | {in_billions(counted)} | {counted / published - 1:+.1%}"
    return f"| {name} | `{model_type}` | {numbers} | {in_billions(left)} | {widths} |"


def main() -> int:
    """Print the table, and write it into the page."""
    parser = argparse.ArgumentParser(description="Inspect the configs of well-known checkpoints.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    known = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in CONFIGS.glob("*.json")}
    chosen = {name: facts for name, facts in known.items() if name in options.only or not options.only}
    lines = ["| checkpoint | `model_type` | published | counted | off by | a fifth less | what goes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, facts in sorted(chosen.items(), key=lambda item: item[1]["num_params"]):
        lines.append(row(name, facts))
        print(lines[-1], flush=True)
    if options.page and not options.only:
        before, rest = options.page.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        options.page.write_text(before + "\n".join([MARKS[0], "", *lines, "", MARKS[1]]) + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
