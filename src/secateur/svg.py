"""Figures as SVG that belongs to a page: its colours, its font, a title and a description for those who do not see it.

In: a matplotlib figure drawn inside `drawing()`. Out: an `<svg>` element to put into HTML. The same figure gives the
same bytes. Colours stand for roles; the page's style sheet says what they look like, in light and in dark.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
