"""A self-contained HTML page. In: sentences and tables. Out: HTML, in which all text is escaped here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text. `numbers`: right-aligned. `folded`: closed until the reader opens it.

    `bars`: for each row the lengths, from 0 to 1, of bars that the page draws behind it.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True
    folded: bool = False
    bars: Sequence[Sequence[float]] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines by name, each of (share, height) from the origin on, up to `top`; `marks`: shares by name."""

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
class KeyFigure:
    """A number that everybody asks for, after and before."""

    label: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Page:
    """A report: the verdict and what stands beside it, then warnings and key figures, then sections."""

    title: str
    verdict: str
    notes: Sequence[str]
    figures: Sequence[KeyFigure]
    sections: Sequence[Section]
    beside: str = ""


def render(page: Page) -> str:
    """Return the page as HTML; the same page gives the same text."""
    from jinja2 import Environment, StrictUndefined

    templates = resources.files("secateur.report") / "templates"
    css = (templates / "report.css").read_text(encoding="utf-8")
    text = (templates / "report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text).render(page=page, css=css) + "\n"
