"""Draw the pictures of README and docs from the tables of docs/results: `python tools/pictures.py`.

Each picture carries a digest of the numbers that it shows, by which a test notices that a table has changed since.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "images"
OURS, INK = "#00796b", "#222"
OTHERS = "#c2410c", "#7c3aed", "#2563eb", "#ca8a04", "#be185d", "#475569", "#7f1d1d", "#0891b2", "#78716c"
STYLE = {
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor", "text.color"), INK),
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 10,
    "figure.figsize": (5.4, 3.6),
    "grid.color": "#ddd",
    "svg.hashsalt": "secateur",
}
Numbers = dict[str, Any]


def rows(page: str, after: str) -> list[list[str]]:
    """Return the cells of the first table, its head included, after a line of docs/PAGE that begins so."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(after)}[\s\S]*?\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    assert found is not None, f"docs/{page} has no table after {after!r}"
    return [[cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def first_number(cell: str) -> float:
    """Return the number that a cell begins with: `24.81`, `1,024`, `3.413 ± 0.069`, `30.0%`."""
    found = re.match(r"[-+]?[\d,]*\.?\d+", cell)
    assert found is not None, cell
    return float(found[0].replace(",", ""))


def quality() -> Numbers:
    """Perplexity of methods as published, by the share of all parameters that stays."""
    found: dict[str, list[tuple[float, float]]] = {}
    for share in ("20%", "30%"):
        for name, removed, _, draws, nats, *_ in rows("results/published.md", f"### {share} of")[2:]:
            if draws == "3" and "least squares" not in name:
                point = (round(100 - first_number(removed), 1), round(math.exp(first_number(nats)), 2))
                name = name.replace(", embedding kept tied", " (tied)")
                found.setdefault(name.split(", ")[0], []).append(point)
    [(_, dense), _] = found.pop("dense")
    return {name: [(100.0, dense), *points] for name, points in found.items()}


def draw_quality(numbers: Numbers, axes: Any) -> None:
    others, last = itertools.cycle(OTHERS), 0.0
    for name, points in sorted(numbers.items(), key=lambda each: each[1][-1][1]):
        ours = name == "secateur"
        left, perplexities = zip(*points, strict=True)
        colour = OURS if ours else next(others)
        axes.plot(left, perplexities, color=colour, marker="o", linewidth=2.5 if ours else 1.2, zorder=2 + ours)
        end = {"fontsize": 11, "weight": "bold"} if ours else {"fontsize": 9}
        last = max(perplexities[-1], 1.22 * last)  # names do not touch
        axes.text(69.3, last, name, color=colour, va="center", **end)
    logarithmic(axes.yaxis, [16, 30, 60, 120, 250, 500])
    axes.set_xlim(101, 57)
    axes.set_xticks([100, 90, 80, 70])
    axes.set_xlabel("share of all parameters that stays, %")
    axes.set_title("Perplexity over size: six domains, SmolLM2-135M, no training")


def repair() -> Numbers:
    """Perplexity at 30% of every FFN's channels by score, without and with least squares."""
    table = rows("scores.md", "**30% of every FFN")
    return {score.strip("`"): [first_number(none), first_number(squares)] for score, none, squares in table[2:]}


def draw_repair(numbers: Numbers, axes: Any) -> None:
    for place, (none, squares) in enumerate(reversed(numbers.values())):
        axes.plot([squares, none], [place, place], color="#bbb", linewidth=2, zorder=1)
        axes.scatter([none], [place], color=OTHERS[0], label=None if place else "without repair", zorder=2)
        axes.scatter([squares], [place], color=OURS, label=None if place else "with least squares", zorder=2)
    logarithmic(axes.xaxis, [16, 30, 100, 1000, 10_000, 100_000])
    axes.set_yticks(range(len(numbers)), list(reversed(numbers)))
    axes.set_xlabel("perplexity")
    axes.set_title("What the repair gains, by score: 30% of every FFN's channels")
    axes.legend(loc="lower right")


def domains() -> Numbers:
    """Perplexity over that of the dense model at 30%, by what was calibrated on and what is read."""
    head, _, dense, *table = rows("results/single_domains.md", "## Perplexity by domain")
    names = head[5:-1]
    cells = {
        row[0].removesuffix(" alone"): [
            round(first_number(cell) / first_number(base), 2) for cell, base in zip(row[5:-1], dense[5:-1], strict=True)
        ]
        for row in table
        if row[1] == "30%"
    }
    return {"read": names, "calibrated": cells}


def draw_domains(numbers: Numbers, axes: Any) -> None:
    read, cells = numbers["read"], numbers["calibrated"]
    shown = [[math.log(value) for value in row] for row in cells.values()]
    axes.imshow(shown, cmap="YlOrBr", vmin=0, vmax=math.log(16), aspect="auto")
    for place, row in enumerate(cells.values()):
        for column, value in enumerate(row):
            colour = "white" if value > 6 else INK
            axes.text(column, place, f"{value:.1f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(read)), read)
    axes.set_yticks(range(len(cells)), ["all six", *list(cells)[1:]])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set_xlabel("text that is read")
    axes.set_ylabel("calibrated on")
    axes.set_title("Times dense perplexity at 30%, equal tokens")


def layers() -> Numbers:
    """Perplexity over that of the dense model at 20, 30 and 50%, by score, with the same least squares."""
    found: dict[str, list[tuple[int, float]]] = {}
    for share in (20, 30, 50):
        _, _, dense, *table = rows(f"results/methods_at_{share}.md", "## Perplexity by domain")
        for row in table:
            found.setdefault(row[0], []).append((share, round(first_number(row[3]) / first_number(dense[3]), 2)))
    return {
        "best": found["best"],
        "defaults": found["default"],
        "FLAP's score, the same layers out": found["FLAP + least squares + depth"],
        "OBS, equal widths alone": found["OBS + least squares"],
        "FLAP's score, equal widths alone": found["FLAP + least squares"],
    }


def draw_layers(numbers: Numbers, axes: Any) -> None:
    for (name, points), colour in zip(numbers.items(), ("#004d40", OURS, *OTHERS), strict=False):
        shares, times = zip(*points, strict=True)
        line = {"marker": "D", "linestyle": "none"} if len(points) == 1 else {"marker": "o"}
        axes.plot(shares, times, color=colour, label=name, linewidth=2 if name == "defaults" else 1.2, **line)
    logarithmic(axes.yaxis, [1.5, 2, 3, 4, 6, 10])
    axes.set_xticks([20, 30, 50])
    axes.set_xlabel("share of all parameters removed, %")
    axes.set_title("Times dense perplexity, each with least squares")
    axes.legend(loc="upper left", fontsize=9)


def equal_bytes() -> Numbers:
    """Bits per byte of six domains in llama.cpp by the size of the file, dense and pruned, in every type."""
    return _equal_bytes("smollm2-135m")


def equal_bytes_second() -> Numbers:
    """The same of a model with 151,936 tokens."""
    return _equal_bytes("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")


def _equal_bytes(model: str) -> Numbers:
    found: dict[str, list[tuple[float, float, str]]] = {}
    _, _, *table = rows("results/equal_bytes.md", f"<!-- table: equal_bytes.py --page {model} -->")
    for name, kind, size, *_, bits, _, _, _ in table:
        found.setdefault(name, []).append((first_number(size), first_number(bits), kind))
    return found


def draw_equal_bytes(model: str, numbers: Numbers, axes: Any) -> None:
    for (name, points), colour in zip(numbers.items(), (INK, OURS, *OTHERS), strict=False):
        plain = [point for point in points if not point[2].endswith("+importance")]
        weighed = [point for point in points if point not in plain]
        axes.plot([x for x, *_ in plain], [y for _, y, _ in plain], color=colour, marker="o", label=name)
        axes.scatter([x for x, *_ in weighed], [y for _, y, _ in weighed], color=colour, marker="*", s=60, zorder=3)
    axes.scatter([], [], color="#777", marker="*", s=60, label="with an importance matrix")
    axes.set_xlabel("size of the GGUF file, MB")
    axes.set_ylabel("bits per byte")
    axes.grid(visible=True)
    axes.set_title(f"{model}, q8_0 to q2_k, in llama.cpp")
    axes.legend(fontsize=9)


def logarithmic(axis: Any, ticks: list[float]) -> None:
    """Give an axis a logarithmic scale with these ticks alone, written as plain numbers."""
    from matplotlib.ticker import NullFormatter, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.grid(visible=True)


PICTURES: dict[str, tuple[Callable[[], Numbers], Callable[[Numbers, Any], None]]] = {
    "quality": (quality, draw_quality),
    "repair": (repair, draw_repair),
    "domains": (domains, draw_domains),
    "layers": (layers, draw_layers),
    "equal_bytes": (equal_bytes, partial(draw_equal_bytes, "SmolLM2-135M")),
    "equal_bytes_second": (equal_bytes_second, partial(draw_equal_bytes, "Qwen2.5-Coder-0.5B")),
}


def digest(numbers: Numbers) -> str:
    """Return what tells whether a picture shows these numbers."""
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def main() -> None:
    """Write all pictures."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    FOLDER.mkdir(exist_ok=True)
    for name, (measured, draw) in PICTURES.items():
        with matplotlib.rc_context(STYLE):
            numbers = measured()
            figure, axes = pyplot.subplots(layout="constrained")
            draw(numbers, axes)
            told = {"Date": None, "Creator": None, "Title": measured.__doc__, "Description": digest(numbers)}
            figure.savefig(FOLDER / f"{name}.svg", metadata=told)
            pyplot.close(figure)


if __name__ == "__main__":
    main()
