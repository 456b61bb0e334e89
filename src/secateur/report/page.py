"""A self-contained HTML page, or what a notebook shows. In: sentences, tables and SVG. Out: HTML.

All text is escaped here, and only here; SVG is inserted as it is.
"""

import importlib.util
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import singledispatch
from importlib import resources
from typing import TYPE_CHECKING, Any

from secateur.errors import RecipeError

if TYPE_CHECKING:
    from pandas import DataFrame

# A wider table does not fit beside a plot.
MAX_PAIR_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text. `numbers`: right-aligned. `folded`: closed until the reader opens it."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """`name`: the id in the page. `plots`: SVG elements. `code`: preformatted text.

    `stacked`: plots stand above the tables, which are wider than half a page.
    """

    name: str
    title: str
    text: Sequence[str] = ()
    plots: Sequence[str] = ()
    tables: Sequence[Table] = ()
    code: str = ""
    stacked: bool = False

    @property
    def shape(self) -> str:
        """Layout: `pair` side by side, `stack` for wide tables, `alone` for one kind only."""
        if not (self.plots and self.tables):
            return "alone"
        return (
            "pair"
            if not self.stacked and all(len(table.header) <= MAX_PAIR_COLUMNS for table in self.tables)
            else "stack"
        )


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A number that everybody asks for, after and before."""

    label: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Page:
    """A report: the verdict first, then key figures, then sections.

    `picture`: the name of the file beside the page that links to it show, if there is one.
    """

    title: str
    verdict: str
    notes: Sequence[str]
    figures: Sequence[KeyFigure]
    sections: Sequence[Section]
    picture: str | None = None


def render(page: Page) -> str:
    """Return the page as HTML; the same page gives the same text."""
    css = (resources.files("secateur.report") / "templates" / "report.css").read_text(encoding="utf-8")
    return _filled("report.html.jinja", page=page, css=css) + "\n"


def _filled(name: str, **values: Any) -> str:
    from jinja2 import Environment, StrictUndefined

    text = (resources.files("secateur.report") / "templates" / name).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text).render(**values)


@dataclass(frozen=True, slots=True)
class View:
    """A result at a glance. `picture`: draws it, given a name for ids. `rows`: numbers by column."""

    title: str
    tables: Sequence[Table]
    rows: Sequence[dict[str, Any]]
    picture: Callable[[str], str] | None = None
    notes: Sequence[str] = field(default=())


@singledispatch
def view(result: Any) -> View:
    """Return a result's view, which is registered where its tables are made; else the names of its fields."""
    return View(", ".join(each.name for each in fields(result)), (), ())


class Shown:
    """What results have in common in notebooks: a line, a table and a picture, numbers as a frame."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Return what it is in one line."""
        return f"<{type(self).__name__}: {_view(self).title}>"

    def _repr_html_(self) -> str:
        """Return what Jupyter shows: tables, and the picture where matplotlib is installed."""
        shown = _view(self)
        can_draw = shown.picture is not None and importlib.util.find_spec("matplotlib") is not None
        # Ids hold in the whole notebook, where there may be several results.
        name = f"view-{zlib.crc32(repr((shown.title, shown.rows)).encode()):x}"
        picture = shown.picture(name) if can_draw and shown.picture is not None else ""
        missing = ["No picture, which needs matplotlib: pip install 'secateur[report]'."]
        notes = [*shown.notes, *(missing if shown.picture is not None and not can_draw else [])]
        return _filled("notebook.html.jinja", view=shown, picture=picture, notes=notes)

    def to_frame(self) -> "DataFrame":
        """Return the numbers as a pandas DataFrame. Raises RecipeError without pandas."""
        try:
            from pandas import DataFrame
        except ImportError:
            raise RecipeError("to_frame: needs pandas; run pip install pandas.") from None
        return DataFrame(list(_view(self).rows))


def _view(result: Shown) -> View:
    import secateur.report.sections_results  # noqa: F401  # registers the views of records, which import this module

    return view(result)
