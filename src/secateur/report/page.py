"""A self-contained HTML page. In: sentences, tables and pictures. Out: HTML.

All text is escaped here, and only here; pictures are elements that are inserted as they are.
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
    """`name`: the id in the page. `plots`: image elements. `code`: preformatted text.

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
        is_narrow = all(len(table.header) <= MAX_PAIR_COLUMNS for table in self.tables)
        return "pair" if is_narrow and not self.stacked else "stack"


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A number that everybody asks for, after and before."""

    label: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Page:
    """A report: the verdict first, then warnings and key figures, then sections."""

    title: str
    verdict: str
    notes: Sequence[str]
    figures: Sequence[KeyFigure]
    sections: Sequence[Section]


def render(page: Page) -> str:
    """Return the page as HTML; the same page gives the same text."""
    from jinja2 import Environment, StrictUndefined

    templates = resources.files("secateur.report") / "templates"
    css = (templates / "report.css").read_text(encoding="utf-8")
    text = (templates / "report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text).render(page=page, css=css) + "\n"
