"""The table of published methods in Markdown, from the finished rows of `run.py`."""

import math
from typing import Any

NAMES = {
    "dense": "dense",
    "secateur": "**secateur**, defaults",
    "best": "**secateur**, `preset: best`",
    "flap-ls": "FLAP's score + our least squares",
    "wanda-ls": "Wanda-sp's score + our least squares",
    "flap": "FLAP (AL-AM)",
    "wanda_sp": "Wanda-sp",
    "llm_pruner": "LLM-Pruner (Taylor)",
    "gisp": "GISP",
    "slicegpt": "SliceGPT",
    "slicegpt_tied": "SliceGPT, embedding kept tied",
    "two_ssp": "2SSP",
    "shortgpt": "ShortGPT",
    "paper": "arXiv 2601.02674, our reconstruction",
}
WIKITEXT = "wikitext2"

_Line = dict[str, Any]
# By domain, the nats of every block of every draw, in the same order for every row.
_Blocks = dict[str, list[float]]


def mean(values: list[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def error(values: list[float]) -> float:
    """Return the standard error of the mean; 0 for one value."""
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / max(len(values) - 1, 1) / len(values))


def over(groups: list[list[float]]) -> tuple[float, float]:
    """Return the mean over groups of their means, and its standard error."""
    return mean([mean(group) for group in groups]), math.hypot(*map(error, groups)) / len(groups)


def blocks_of(lines: list[_Line], draws: list[int]) -> _Blocks:
    """Return the nats of every block by domain, draw after draw."""
    by_draw = {line["draw"]: line["nats"] for line in lines}
    return {name: [nats for draw in draws for nats in by_draw[draw][name]] for name in lines[0]["nats"]}


def paired(mine: _Blocks, other: _Blocks) -> tuple[float, float]:
    """Return the mean over domains of mine minus the other's, block by block, and its error."""
    names = [name for name in mine if name != WIKITEXT]
    return over([[a - b for a, b in zip(mine[name], other[name], strict=True)] for name in names])


def accuracies(lines: list[_Line]) -> dict[str, list[float]]:
    """Return by task each question's `acc`, averaged over the draws that asked it."""
    lines = [line for line in lines if line["tasks"]]
    if not lines:
        return {}
    return {
        name: [mean(list(each)) for each in zip(*(line["tasks"][name]["acc"] for line in lines), strict=True)]
        for name in lines[0]["tasks"]
    }


def joined(lines: list[_Line]) -> list[_Line]:
    """Return one line for each row, share and draw judged by text, with its tasks if they are there."""
    tasks = {(line["row"], line["share"], line["draw"]): line["tasks"] for line in lines if line["part"] == "tasks"}
    texts = [line for line in lines if line["part"] == "text"]
    return [line | {"tasks": tasks.get((line["row"], line["share"], line["draw"]), {})} for line in texts]


def markdown(lines: list[_Line]) -> str:
    """Return one table per share: the mean over each row's finished draws."""
    lines = joined(lines)
    shares = sorted({line["share"] for line in lines if line["row"] != "dense"})
    return "\n\n".join(_one_share(lines, share) for share in shares)


def _one_share(lines: list[_Line], share: float) -> str:
    by_row: dict[str, list[_Line]] = {}
    for line in lines:
        if line["row"] == "dense" or line["share"] == share:
            by_row.setdefault(line["row"], []).append(line)
    tasks = list(max((line["tasks"] for line in lines), key=len))
    head = ["method", "removed", "its repair", "draws", "nats per token", "minus secateur", "WikiText-2 ppl"]
    head += [*tasks, "mean acc", "s"]
    rows = [f"### {share:.0%} of all parameters", ""]
    rows += ["| " + " | ".join(head) + " |", "|---|---:|---|" + "---:|" * (len(head) - 3)]
    order = [name for name in NAMES if name in by_row]
    rows += [_row(name, by_row[name], by_row.get("secateur", []), tasks) for name in order]
    return "\n".join(rows)


def _row(name: str, lines: list[_Line], ours: list[_Line], tasks: list[str]) -> str:
    draws = sorted(line["draw"] for line in lines)
    blocks = blocks_of(lines, draws)
    nats, nats_error = over([values for domain, values in blocks.items() if domain != WIKITEXT])
    both = [line for line in lines if line["draw"] in {each["draw"] for each in ours}]
    against = ""
    if both and name != "secateur":
        common = sorted(line["draw"] for line in both)
        ours = [line for line in ours if line["draw"] in common]
        difference, its_error = paired(blocks_of(both, common), blocks_of(ours, common))
        against = f"{difference:+.3f} ± {its_error:.3f}"
    by_task = accuracies(lines)
    groups = [by_task[task] for task in tasks if task in by_task]
    shown = [(mean(values), error(values)) for values in groups] + ([over(groups)] if groups else [])
    cells = [NAMES[name], f"{mean([line['removed'] for line in lines]):.1%}", lines[0]["repair"], str(len(draws))]
    cells += [f"{nats:.3f} ± {nats_error:.3f}", against, f"{math.exp(min(mean(blocks[WIKITEXT]), 700)):.4g}"]
    cells += [f"{middle:.3f} ± {spread:.3f}" for middle, spread in shown] or [""] * (len(tasks) + 1)
    cells += [f"{mean([line['prune_seconds'] for line in lines]):.0f}"]
    return "| " + " | ".join(cells) + " |"
