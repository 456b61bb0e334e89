"""What a page's HTML is asked in tests: is it well-formed, what does it hold, would it load anything."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}
LOADING = {"src", "href", "srcset", "action", "poster", "data", "xlink:href"}


class PageChecks(HTMLParser):
    """`problems`: tags closed out of order, doubled ids. `loads`: attribute values that could fetch something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: dict[str, str] = {}
        self.feed(html)
        self.close()
        self.problems += [f"never closed: {tag}" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"closed out of order: {tag}")

    def _see(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tags.append(tag)
        identity = attributes.get("id")
        if identity:
            if identity in self.ids:
                self.problems.append(f"id twice: {identity}")
            self.ids[identity] = tag
        self.loads += [value or "" for key, value in attributes.items() if key in LOADING and value != "data:,"]
