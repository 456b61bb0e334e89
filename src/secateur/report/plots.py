"""The report's plots: numbers in, `<img>` elements out that hold their picture. Pure functions."""

import base64
import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, LINE, DENSE, PRUNED, OTHER = "#1d1f24", "#c9ccd2", "#5b6069", "#0a5aa8", "#b04a00"
# Points; the page shows a point as 1 to 1.5 pixels, so that a figure fits a phone.
WIDTH, INCH = 360, 72
LABEL_CHARACTERS, LINE_HEIGHT = 18, 14

_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LINE),
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "legend.labelcolor", "text.color"), INK),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.labelsize", "axes.titlesize", "font.size"), 11),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    "axes.axisbelow": True,
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
    """A plot's title and description, for who does not see it."""

    title: str
    description: str


@dataclass(frozen=True, slots=True)
class Series:
    """A mark per row. `reach`: bar lengths below and above. `look`: a key of LOOKS."""

    label: str
    look: str
    values: Sequence[float]
    reach: Sequence[tuple[float, float]] | None = None


LOOKS: dict[str, dict[str, Any]] = {
    "dense": {"color": DENSE, "marker": "o", "markerfacecolor": "none"},
    "pruned": {"color": PRUNED, "marker": "o"},
    "ideal": {"color": DENSE, "marker": "D", "markerfacecolor": "none"},
}


@contextmanager
def _drawing() -> Iterator[None]:
    """Set the style for figures that the block draws and turns into images."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Browsers have glyphs of other scripts; here only their width matters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def dot_plot(
    text: Text, rows: Sequence[str], series: Sequence[Series], x_label: str, reference: float | None = None
) -> str:
    """Return a row of marks with error bars per name. `reference`: where the dense model is, a dashed line."""
    with _drawing():
        from matplotlib.ticker import MaxNLocator

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
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(x_label)
        return _with_legend(figure, axes, text)


def width_plot(text: Text, groups: Mapping[str, Mapping[int, tuple[int, int]]]) -> str:
    """Return bars by layer, a panel per group. `groups`: by layer, units before and kept."""
    with _drawing():
        from matplotlib.ticker import MaxNLocator

        figure = _figure(50 + 120 * len(groups))
        panels = list(figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0])
        for axes, (group, units) in zip(panels, groups.items(), strict=True):
            before, kept = zip(*units.values(), strict=True)
            axes.set_title(_wrapped(group, 2 * LABEL_CHARACTERS))
            axes.set_ylabel("units")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="x", visible=False)
            axes.bar(list(units), before, 0.8, label="before", facecolor="none", edgecolor=DENSE, linewidth=0.8)
            axes.bar(list(units), kept, 0.8, label="kept", color=PRUNED)
        panels[-1].set_xlabel("layer")
        return _with_legend(figure, panels[0], text)


def _figure(height: int) -> "Figure":
    from matplotlib.figure import Figure

    return Figure((WIDTH / INCH, height / INCH), layout="constrained")


def _with_legend(figure: "Figure", axes: "Axes", text: Text) -> str:
    """Return the figure with a legend above it, as an image element of SVG."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, handlelength=1.6, columnspacing=1.2)
    stream = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", facecolor="white", metadata=metadata)
    data = base64.b64encode(stream.getvalue()).decode()
    said = escape(f"{text.title}. {text.description}")
    return f'<img alt="{said}" src="data:image/svg+xml;base64,{data}">'


def _wrapped(name: str, width: int = LABEL_CHARACTERS) -> str:
    """Return the whole name on lines of at most so many characters."""
    printable = "".join(character if character.isprintable() else " " for character in name)
    return "\n".join(textwrap.wrap(printable, width))
