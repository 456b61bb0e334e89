"""The report's plots: numbers in, SVG out; and the picture to share, as PNG. Pure functions."""

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colours for matplotlib, and what the page has instead.
INK, LINE, DENSE, PRUNED, OTHER = "#010101", "#020202", "#030303", "#040404", "#050505"
_PAGE_COLOURS = {
    INK: "currentColor",
    LINE: "var(--line)",
    DENSE: "var(--dense)",
    PRUNED: "var(--pruned)",
    OTHER: "var(--other)",
}

# Points; the page shows a point as 1 to 1.5 pixels, so that a figure fits a phone.
WIDTH, INCH = 360, 72
LABEL_CHARACTERS, LINE_HEIGHT = 18, 14

_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LINE),
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "legend.labelcolor", "text.color"), INK),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.labelsize", "axes.titlesize", "font.size"), 11),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    "axes.grid": True,
    "axes.titlelocation": "left",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # wider than browsers' fonts
    "grid.linewidth": 0.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",
    "text.parse_math": False,  # a domain may be called $x$
}


@dataclass(frozen=True, slots=True)
class Text:
    """A plot's title and description. `name`: unique in the page, for ids; letters, hyphens."""

    name: str
    title: str
    description: str


@contextmanager
def drawing() -> Iterator[None]:
    """Set the style for figures that the block draws and turns into SVG."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Browsers have glyphs of other scripts; here only their width matters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def to_svg(figure: "Figure", text: Text) -> str:
    """Return the figure as an inline SVG element, with the page's colours and font."""
    stream = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    _, _, inside = re.sub("<!--.*?-->", "", stream.getvalue(), flags=re.DOTALL).partition("<svg ")
    attributes, _, inside = inside.partition(">")
    _, _, inside = inside.partition("</defs>")  # drops a style sheet that would affect the whole page
    inside = re.sub("<[^>]+>", lambda tag: _of_the_page(tag[0], text.name), inside)
    box = re.findall(r'viewBox="[^"]*"', attributes)[0]
    label = f'role="img" aria-labelledby="{text.name}-title {text.name}-desc"'
    said = f'<title id="{text.name}-title">{escape(text.title)}</title>'
    said += f'<desc id="{text.name}-desc">{escape(text.description)}</desc>'
    return f"<svg {box} {label}>{said}{inside.strip()}"


def _of_the_page(tag: str, name: str) -> str:
    """Return a tag with ids unique in the page, and the page's colours."""
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    return re.sub("|".join(_PAGE_COLOURS), lambda found: _PAGE_COLOURS[found[0]], tag)


@dataclass(frozen=True, slots=True)
class Series:
    """A mark per row or round. `reach`: bar lengths below and above. `look`: a key of LOOKS."""

    label: str
    look: str
    values: Sequence[float]
    reach: Sequence[tuple[float, float]] | None = None


ByLayer = Mapping[str, Mapping[int, Sequence[Any]]]  # group -> layer -> numbers

LOOKS: dict[str, dict[str, Any]] = {
    "dense": {"color": DENSE, "marker": "o", "markerfacecolor": "none"},
    "pruned": {"color": PRUNED, "marker": "o"},
    "before": {"color": OTHER, "marker": "x"},
    "ideal": {"color": DENSE, "marker": "D", "markerfacecolor": "none"},
}


def dot_plot(
    text: Text, rows: Sequence[str], series: Sequence[Series], x_label: str, reference: float | None = None
) -> str:
    """Return a row of marks with error bars per name. `reference`: where the dense model is, a dashed line."""
    with drawing():
        labels = [_wrapped(row) for row in rows]
        lines = max(label.count("\n") + 1 for label in labels)
        figure = _figure(60 + max(12 * len(series) + 10, LINE_HEIGHT * lines + 6) * len(rows))
        axes = figure.add_subplot()
        for place, one in enumerate(series):
            shift = (place - (len(series) - 1) / 2) * 0.6 / len(series)
            heights = [row + shift for row in range(len(rows))]
            reach = list(zip(*one.reach, strict=True)) if one.reach else None
            axes.errorbar(
                one.values, heights, xerr=reach, label=one.label, linestyle="none", capsize=2, **LOOKS[one.look]
            )
        if reference is not None:
            axes.axvline(reference, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), label="dense")
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(x_label)
        return _with_legend(figure, axes, text)


def width_plot(text: Text, groups: ByLayer) -> str:
    """Return bars by layer, a panel per group. `groups`: by layer, units before and kept."""

    def draw(axes: "Axes", layers: list[int], before: Any, kept: Any) -> None:
        axes.bar(layers, before, 0.8, label="before", facecolor="none", edgecolor=DENSE, linewidth=0.8)
        axes.bar(layers, kept, 0.8, label="kept", color=PRUNED)

    return _by_layer(text, groups, draw, height=120, y_label="units")


def spread_plot(text: Text, groups: ByLayer, y_label: str) -> str:
    """Return a line over all values per layer, thick over the middle half, a mark at the median.

    `groups`: by layer, five quantiles, smallest first.
    """
    from matplotlib import ticker

    def draw(axes: "Axes", layers: list[int], low: Any, first: Any, median: Any, third: Any, high: Any) -> None:
        axes.vlines(layers, low, high, color=DENSE, linewidth=0.8, label="all")
        axes.vlines(layers, first, third, color=PRUNED, linewidth=3, label="middle half")
        axes.plot(layers, median, linestyle="none", marker="_", markersize=6, color=INK, label="median")
        if min(low) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(numticks=5))
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())

    return _by_layer(text, groups, draw, height=150, y_label=y_label)


def error_plot(text: Text, groups: ByLayer, y_label: str) -> str:
    """Return the mean error by layer before and after compensation, bars from best to worst.

    `groups`: by layer, the domains' errors before and after.
    """

    def draw(axes: "Axes", layers: list[int], before: Any, after: Any) -> None:
        looks = ((before, "before compensation", "before", ":"), (after, "after", "pruned", "-"))
        for rows, label, look, line in looks:
            means = [sum(row) / len(row) for row in rows]
            reach = [[m - min(row) for m, row in zip(means, rows, strict=True)]]
            reach += [[max(row) - m for m, row in zip(means, rows, strict=True)]]
            style = LOOKS[look] | {"markersize": 4, "linewidth": 1, "elinewidth": 0.7, "linestyle": line}
            axes.errorbar(layers, means, yerr=reach, label=label, **style)
        axes.set_ylim(bottom=0)

    return _by_layer(text, groups, draw, height=150, y_label=y_label)


def line_plot(text: Text, x: Sequence[int | float], series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Return a line per series, with a mark at each round, or one curve."""
    with drawing():
        figure = _figure(190)
        axes = figure.add_subplot()
        for one, line in zip(series, ("-",) if len(series) == 1 else (":", "-"), strict=True):
            small = {"linewidth": 1, "marker": ".", "markersize": 3} if len(series) == 1 else {}
            axes.errorbar(x, one.values, label=one.label, linestyle=line, **LOOKS[one.look] | small)
        if len(series) > 1:
            axes.set_xticks(x)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _with_legend(figure, axes, text) if len(series) > 1 else to_svg(figure, text)


def _figure(height: int) -> "Figure":
    from matplotlib.figure import Figure

    return Figure((WIDTH / INCH, height / INCH), layout="constrained")


def _by_layer(text: Text, groups: ByLayer, draw: Callable[..., None], height: int, y_label: str) -> str:
    """Return a panel per group. `draw`: gets axes, layers, and their numbers as columns."""
    with drawing():
        from matplotlib.ticker import MaxNLocator

        figure = _figure(50 + height * len(groups))
        panels = list(figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0])
        for axes, (title, numbers) in zip(panels, groups.items(), strict=True):
            axes.set_title(_wrapped(title, 2 * LABEL_CHARACTERS))
            axes.set_ylabel(y_label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="x", visible=False)
            draw(axes, list(numbers), *zip(*numbers.values(), strict=True))
        panels[-1].set_xlabel("layer")
        return _with_legend(figure, panels[0], text)


def _with_legend(figure: "Figure", axes: "Axes", text: Text) -> str:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, handlelength=1.6, columnspacing=1.2)
    return to_svg(figure, text)


def _wrapped(name: str, width: int = LABEL_CHARACTERS) -> str:
    """Return the whole name on lines of at most so many characters."""
    printable = "".join(character if character.isprintable() else " " for character in name)
    return "\n".join(textwrap.wrap(printable, width))


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of quality over size: (size, perplexity), the dense model's first."""

    label: str
    points: Sequence[tuple[float, float]]


# Of what is shared: pixels, as pages that show links want them, and colours of its own, on white.
SHARED_SIZE, SHARED_DPI = (1200, 630), 100
_SHARED_COLOURS = {INK: "#1d1f24", LINE: "#c9ccd2", DENSE: "#5b6069", PRUNED: "#0a5aa8", OTHER: "#b04a00"}
_SHARED_CURVES = ("#0a5aa8", "#b04a00", "#00796b", "#7c3aed", "#be185d", "#a16207", "#475569", "#0891b2")
_SHARED_MARKERS = "osD^vP*X"
MOST_CURVES, MOST_LINEAR = 10, 4


def shared_picture(
    title: str,
    sentence: str,
    curves: Sequence[Curve],
    x_label: str,
    dashed: float | None = None,
    y_label: str = "perplexity",
) -> bytes:
    """Return the picture of quality over size that a link to a page shows, a PNG of 1200 x 630.

    `curves`: the one that counts first; those beyond MOST_CURVES are counted in the legend alone.
    `dashed`: the dense model's value, for curves that all begin there.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    style: dict[Any, Any] = {
        key: _SHARED_COLOURS.get(value, value) if isinstance(value, str) else value for key, value in _STYLE.items()
    }
    with matplotlib.rc_context(style | dict.fromkeys(("font.size", "axes.labelsize"), 17)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure((SHARED_SIZE[0] / SHARED_DPI, SHARED_SIZE[1] / SHARED_DPI), SHARED_DPI, facecolor="white")
        head, said = _wrapped(title, 54).split("\n"), _wrapped(sentence, 88).split("\n")
        figure.text(0.04, 0.95, _first_lines(head, 2), fontsize=26, weight="bold", va="top")
        below = 0.95 - 0.068 * min(len(head), 2) - 0.015
        figure.text(0.04, below, _first_lines(said, 3), fontsize=17, va="top", color=_SHARED_COLOURS[DENSE])
        top = below - 0.046 * min(len(said), 3) - 0.04
        axes = figure.add_axes((0.085, 0.15, 0.58, top - 0.15))
        for number, curve in enumerate(curves[:MOST_CURVES]):
            look: dict[str, Any] = {"color": _SHARED_CURVES[number % 8], "marker": _SHARED_MARKERS[number % 8]}
            look |= {"linewidth": 1.6, "markersize": 8} if number else {"linewidth": 4, "markersize": 11, "zorder": 3}
            axes.plot(*zip(*curve.points, strict=True), label=_wrapped(curve.label, 28), **look)
        if len(curves) > MOST_CURVES:
            axes.plot([], [], linestyle="none", label=f"and {len(curves) - MOST_CURVES} more")
        if dashed is not None:
            axes.axhline(dashed, color=_SHARED_COLOURS[DENSE], linestyle=(0, (3, 3)), label=f"dense: {dashed:,.2f}")
        axes.invert_xaxis()
        axes.margins(0.08, 0.12)
        values = [perplexity for curve in curves[:MOST_CURVES] for _, perplexity in curve.points]
        if max(values) > MOST_LINEAR * min(values):
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            ticks = [tick for power in range(7) for tick in (10**power, 2 * 10**power, 5 * 10**power)]
            axes.set_yticks([tick for tick in ticks if low <= tick <= high])
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        ticks = _apart({size for curve in curves for size, _ in curve.points})
        axes.set_xticks(ticks, [f"{tick:,.3g}" if tick < 1000 else f"{tick:,.0f}" for tick in ticks])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.05), fontsize=14, handlelength=1.4)
        figure.text(0.98, 0.03, "made by secateur", ha="right", fontsize=14, color=_SHARED_COLOURS[DENSE])
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _apart(sizes: set[float]) -> list[float]:
    """Return the ends, and between them those that are so far apart that their labels do not touch."""
    first, *inner, last = sorted(sizes) if len(sizes) > 1 else [*sizes] * 2
    ticks = [first, last]
    for size in inner:
        if min(abs(size - tick) for tick in ticks) > 0.1 * (last - first):
            ticks.append(size)
    return ticks


def _first_lines(lines: Sequence[str], most: int) -> str:
    return "\n".join(lines) if len(lines) <= most else "\n".join([*lines[: most - 1], f"{lines[most - 1]}…"])
