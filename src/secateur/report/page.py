"""Tables of text as they are shown: in the terminal, in Markdown, and on a self-contained HTML
page.

In: sentences and tables. Out: what rich draws; Markdown or HTML, in which all text is escaped here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from rich import table as rich_table
from rich.box import HEAVY_HEAD, Box
from rich.console import Group
from rich.jupyter import JupyterMixin
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text; below a header of numbers, right-aligned. `folded`: closed until the reader
    opens it.

    `bars`: for each row the lengths, from 0 to 1, of bars that the page draws behind it.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    bars: Sequence[Sequence[float]] = ()


class Tables(Group, JupyterMixin):
    """Tables and notes, which rich draws in a terminal and in a notebook."""


def terminal(
    tables: Iterable[Table],
    notes: Iterable[tuple[str, ...]] = (),
    box: Box = HEAVY_HEAD,
    *,
    warnings: Iterable[str] = (),
) -> Tables:
    """Return warnings, the tables that have rows, and the notes below them."""
    shown = []
    for table in (table for table in tables if table.rows):
        made = rich_table.Table(
            title=table.caption or None,
            title_justify="left",
            title_style="bold",
            box=box,
            pad_edge=box is HEAVY_HEAD,
        )
        for name in table.header:
            made.add_column(name, justify="right" if made.columns else "left", overflow="fold")
        for row in table.rows:
            made.add_row(*row)
        shown.append(made)
    grid = rich_table.Table.grid(padding=(0, 2))
    for note in notes:
        grid.add_row(*note)
    return Tables(*(Text(f"note: {warning}") for warning in warnings), *shown, grid)


# What Markdown or HTML would read as more than text: an underscore inside a word is text, a mark of
# a list or heading counts at the beginning.
_MARKUP = re.compile(r"[\\`*\[\]<>&|~$]|\b_+|_+\b|^[-+#](?=[-+# ]|$)|^\d+(?=[.)]( |$))")


def escaped(text: str) -> str:
    """Return the text for Markdown, on one line: names of models and domains are shown as they
    are.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return _MARKUP.sub(lambda mark: "".join(f"&#{ord(c)};" for c in mark[0]), line)


def code(text: str) -> str:
    """Return the text as code in Markdown, on one line; other than printable characters as
    escapes.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def markdown(table: Table) -> list[str]:
    """Return the table's lines in Markdown, without its caption."""
    rule = "|---|" + "---:|" * (len(table.header) - 1)
    header, *rows = (
        "| " + " | ".join(map(escaped, cells)) + " |" for cells in (table.header, *table.rows)
    )
    return [header, rule, *rows]


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines by name, each of (share, height) from the origin on, up to `top`; `marks`: shares by
    name.
    """

    caption: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    marks: Mapping[str, float]
    top: float


@dataclass(frozen=True, slots=True)
class Section:
    """`name`: the id in the page. `code`: preformatted text."""

    name: str
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    code: str = ""
    chart: Chart | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """A report: the verdict and what stands beside it, then warnings, then sections."""

    title: str
    verdict: str
    notes: Sequence[str]
    sections: Sequence[Section]
    beside: str = ""


def render(page: Page) -> str:
    """Return the page as HTML; the same page gives the same text."""
    from jinja2 import Environment, StrictUndefined

    templates = resources.files("secateur.report") / "templates"
    css = (templates / "report.css").read_text(encoding="utf-8")
    text = (templates / "report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(page=page, css=css) + "\n"
