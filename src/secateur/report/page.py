"""A self-contained HTML page. In: titles, sentences, tables and SVG. Out: the page as text.

All text is escaped here, and only here; SVG is inserted as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

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
    """`name`: the id in the page. `plots`: SVG elements. `code`: preformatted text."""

    name: str
    title: str
    text: Sequence[str] = ()
    plots: Sequence[str] = ()
    tables: Sequence[Table] = ()
    code: str = ""

    @property
    def shape(self) -> str:
        """Layout: `pair` side by side, `stack` for wide tables, `alone` for one kind only."""
        if not (self.plots and self.tables):
            return "alone"
        return "pair" if all(len(table.header) <= MAX_PAIR_COLUMNS for table in self.tables) else "stack"


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A number that everybody asks for, after and before."""

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
