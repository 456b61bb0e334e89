"""Figures as SVG that belongs to a page: its colours, its font, a title and a description for those who do not see it.

In: a matplotlib figure drawn inside `drawing()`. Out: an `<svg>` element to put into HTML. The same figure gives the
same bytes. Colours stand for roles; the page's style sheet says what they look like, in light and in dark.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
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
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


@contextmanager
def drawing() -> Iterator[None]:
    """Set the style for the figures made, and turned into SVG, inside the block."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser has the glyphs of other scripts; here only their width is guessed.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def to_svg(figure: "Figure", name: str, title: str, description: str) -> str:
    """Return the figure as an SVG element. `name`: letters and hyphens, unique in the page; all ids begin with it."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    for child in [child for child in root if _is_of_the_file(child)]:
        root.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = {_key(key): _value(key, value, name) for key, value in element.attrib.items()}
    for key in ("width", "height", "version"):
        del root.attrib[key]
    root.attrib |= {
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "style": "stroke-linejoin: round; stroke-linecap: butt; fill: currentColor",
    }
    for tag, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(0, element)
    svg = ElementTree.tostring(root, encoding="unicode")
    return re.sub("|".join(_PAGE_COLOURS), lambda found: _PAGE_COLOURS[found[0]], svg)


def _is_of_the_file(child: ElementTree.Element) -> bool:
    """Metadata, and a style sheet that would reach the whole page."""
    return child.tag == f"{_SVG}metadata" or child.find(f"{_SVG}style") is not None


def _key(key: str) -> str:
    return "href" if key == _LINK else key


def _value(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == _LINK:
        return value.replace("#", f"#{name}-", 1)
    return value.replace("url(#", f"url(#{name}-")
