"""The report's plots: numbers in, SVG out. Pure functions; `report` says what the numbers are."""

import io
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholders that matplotlib takes for colours, and what the page reads instead.
INK, LINE, DENSE, PRUNED, OTHER = "#010101", "#020202", "#030303", "#040404", "#050505"
_PAGE_COLOURS = {
    INK: "currentColor",
    LINE: "var(--line)",
    DENSE: "var(--dense)",
    PRUNED: "var(--pruned)",
    OTHER: "var(--other)",
}

# Points; the page shows one point as one to one and a half pixels, so that a figure fits a phone.
WIDTH, INCH = 360, 72

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # wider than what browsers show, so nothing that fits here overlaps there
    "font.size": 11,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",
    "text.color": INK,
    "text.parse_math": False,  # a domain may be called $x$
    "xtick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True, slots=True)
class Text:
    """What a plot is called. `name`: letters and hyphens, unique in the page, for its ids. The rest is read out."""

    name: str
    title: str
    description: str


@contextmanager
def drawing() -> Iterator[None]:
    """Set the style for the figures made, and turned into SVG, inside the block."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser has the glyphs of other scripts; here only their width is guessed.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def to_svg(figure: "Figure", text: Text) -> str:
    """Return the figure as an SVG element.

    It is part of the page and no `<img>`, which would know neither the page's colours nor its font.
    """
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    _, _, inside = re.sub("<!--.*?-->", "", stream.getvalue(), flags=re.DOTALL).partition("<svg ")
    attributes, _, inside = inside.partition(">")
    _, _, inside = inside.partition("</defs>")  # a style sheet, which would reach the whole page
    inside = re.sub("<[^>]+>", lambda tag: _of_the_page(tag[0], text.name), inside)
    box = re.findall(r'viewBox="[^"]*"', attributes)[0]
    label = f'role="img" aria-labelledby="{text.name}-title {text.name}-desc"'
    said = f'<title id="{text.name}-title">{escape(text.title)}</title>'
    said += f'<desc id="{text.name}-desc">{escape(text.description)}</desc>'
    return f"<svg {box} {label}>{said}{inside.strip()}"


def _of_the_page(tag: str, name: str) -> str:
    """Return a tag with ids that are unique in the page, and the page's colours."""
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    return re.sub("|".join(_PAGE_COLOURS), lambda found: _PAGE_COLOURS[found[0]], tag)


LABEL_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class Series:
    """One mark per row or round; `reach`: how far its bar goes below and above. `look` is a key of LOOKS."""

    label: str
    look: str
    values: Sequence[float]
    reach: Sequence[tuple[float, float]] | None = None


ByLayer = Mapping[str, Mapping[int, Sequence[Any]]]  # kind of group -> layer -> its numbers

LOOKS: dict[str, dict[str, Any]] = {
    "dense": {"color": DENSE, "marker": "o", "markerfacecolor": "none"},
    "pruned": {"color": PRUNED, "marker": "o"},
    "before": {"color": OTHER, "marker": "x"},
    "ideal": {"color": DENSE, "marker": "D", "markerfacecolor": "none"},
}


def dot_plot(
    text: Text, rows: Sequence[str], series: Sequence[Series], x_label: str, reference: float | None = None
) -> str:
    """Return one row of marks per name, with error bars; `reference` draws a dashed upright line."""
    with drawing():
        figure = _figure(60 + (12 * len(series) + 10) * len(rows))
        axes = figure.add_subplot()
        for place, one in enumerate(series):
            shift = (place - (len(series) - 1) / 2) * 0.6 / len(series)
            heights = [row + shift for row in range(len(rows))]
            reach = list(zip(*one.reach, strict=True)) if one.reach else None
            axes.errorbar(
                one.values, heights, xerr=reach, label=one.label, linestyle="none", capsize=2, **LOOKS[one.look]
            )
        if reference is not None:
            axes.axvline(reference, color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_yticks(range(len(rows)), [_short(row) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(x_label)
        return _with_legend(figure, axes, text)


def width_plot(text: Text, groups: ByLayer) -> str:
    """Return bars by layer, a panel per group: the frame is what a layer had, the filled part what it kept.

    `groups`: by layer, units before and kept.
    """
    with drawing():
        figure, panels = _layer_panels(groups, height=120, y_label="units")
        for axes, units in zip(panels, groups.values(), strict=True):
            before, kept = zip(*units.values(), strict=True)
            axes.bar(list(units), before, 0.8, label="before", facecolor="none", edgecolor=DENSE, linewidth=0.8)
            axes.bar(list(units), kept, 0.8, label="kept", color=PRUNED)
        return _with_legend(figure, panels[0], text)


def spread_plot(text: Text, groups: ByLayer, y_label: str) -> str:
    """Return, by layer, a thin line over all values, a thick one over the middle half, a mark at the median.

    `groups`: by layer, five quantiles, smallest first.
    """
    with drawing():
        figure, panels = _layer_panels(groups, height=150, y_label=y_label)
        for axes, quantiles in zip(panels, groups.values(), strict=True):
            layers, (low, first, median, third, high) = list(quantiles), zip(*quantiles.values(), strict=True)
            axes.vlines(layers, low, high, color=DENSE, linewidth=0.8, label="all")
            axes.vlines(layers, first, third, color=PRUNED, linewidth=3, label="middle half")
            axes.plot(layers, median, linestyle="none", marker="_", markersize=6, color=INK, label="median")
            if min(low) > 0:
                _log_scale(axes)
        return _with_legend(figure, panels[0], text)


def error_plot(text: Text, groups: ByLayer, y_label: str) -> str:
    """Return, by layer, the mean error over domains before and after compensation, with bars from best to worst.

    `groups`: by layer, the domains' errors before, and those after.
    """
    with drawing():
        figure, panels = _layer_panels(groups, height=150, y_label=y_label)
        for axes, errors in zip(panels, groups.values(), strict=True):
            before, after = zip(*errors.values(), strict=True)
            looks = ((before, "before compensation", "before", ":"), (after, "after", "pruned", "-"))
            for rows, label, look, line in looks:
                means = [sum(row) / len(row) for row in rows]
                reach = [[m - min(row) for m, row in zip(means, rows, strict=True)]]
                reach += [[max(row) - m for m, row in zip(means, rows, strict=True)]]
                style = LOOKS[look] | {"markersize": 4, "linewidth": 1, "elinewidth": 0.7, "linestyle": line}
                axes.errorbar(list(errors), means, yerr=reach, label=label, **style)
            axes.set_ylim(bottom=0)
        return _with_legend(figure, panels[0], text)


def line_plot(text: Text, x: Sequence[int | float], series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Return a line per series: over rounds with a mark at each, or one curve alone."""
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


def _layer_panels(titles: Collection[str], height: int, y_label: str) -> tuple["Figure", list["Axes"]]:
    from matplotlib.ticker import MaxNLocator

    figure = _figure(50 + height * len(titles))
    panels = list(figure.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0])
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(_short(title))
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="x", visible=False)
    panels[-1].set_xlabel("layer")
    return figure, panels


def _log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _with_legend(figure: "Figure", axes: "Axes", text: Text) -> str:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, handlelength=1.6, columnspacing=1.2)
    return to_svg(figure, text)


def _short(name: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in name)
    if len(printable) <= LABEL_CHARACTERS:
        return printable
    # Names in one plot often begin alike and end apart.
    end = LABEL_CHARACTERS // 3
    return f"{printable[: LABEL_CHARACTERS - 1 - end]}…{printable[-end:]}"
