"""A page of HTML that needs nothing but itself. In: titles, sentences, tables and SVG. Out: the page as text.

All text is escaped here, and only here; SVG is put in as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

# Of a table with more columns the last ones would be out of sight beside a plot.
MAX_PAIR_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text, each beginning with what it is about. `numbers`: right-aligned. `folded`: opened on demand."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """`name`: the id in the page. `plots` are SVG elements; `code` is set as it is typed."""

    name: str
    title: str
    text: Sequence[str] = ()
    plots: Sequence[str] = ()
    tables: Sequence[Table] = ()
    code: str = ""

    @property
    def shape(self) -> str:
        """How plots and tables stand: `pair` side by side, `stack` where a table needs the whole width, `alone`."""
        if not (self.plots and self.tables):
            return "alone"
        return "pair" if all(len(table.header) <= MAX_PAIR_COLUMNS for table in self.tables) else "stack"


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """One number that everybody asks for, after and before."""

    label: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Page:
    """A report: the verdict first, then key figures, then sections."""

    title: str
    verdict: str
    notes: Sequence[str]
    figures: Sequence[KeyFigure]
    sections: Sequence[Section]


def render(page: Page) -> str:
    """Return the page as HTML; the same page gives the same text."""
    from jinja2 import Environment, StrictUndefined

    templates = resources.files("secateur.report") / "templates"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((templates / "report.html.jinja").read_text(encoding="utf-8"))
    css = (templates / "report.css").read_text(encoding="utf-8")
    return template.render(page=page, css=css) + "\n"
