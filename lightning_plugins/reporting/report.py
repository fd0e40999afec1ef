"""A report of one HTML file that opens offline: text, tables and figures, with every image embedded.

The page has no script and asks nothing of the network; a content security policy in its head forbids both. Whatever comes
from outside (titles, file names, column names) is escaped by the template engine.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.optional import require
from lightning_plugins.reporting.tables import Cell, Row, layout

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Text:
    """Paragraphs, under a heading of their own if one is given."""

    paragraphs: Sequence[str]
    heading: str = ""
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Table:
    """A table of rows; ``digits`` are the significant digits of its floats."""

    rows: Sequence[Row]
    caption: str = ""
    heading: str = ""
    digits: int = 4
    kind: str = field(default="table", init=False)

    @property
    def cells(self) -> tuple[list[Cell], list[list[Cell]]]:
        """Head and body."""
        return layout(self.rows, self.digits)


@dataclass(frozen=True)
class Figure:
    """A PNG image with its caption."""

    png: bytes
    caption: str
    heading: str = ""
    kind: str = field(default="figure", init=False)

    @property
    def uri(self) -> str:
        """The image itself, as an address."""
        return "data:image/png;base64," + b64encode(self.png).decode("ascii")


Section = Text | Table | Figure


def write_report(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write the report, whole or not at all.

    Args:
        path: the HTML file to write.
        title: heading of the page, plain text.
        sections: what follows, in order.
    """
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(title=title, sections=sections)
    with atomic_write(path, "w") as file:
        file.write(page)
