"""Oracle: the standard library's HTML parser reads what was written."""

from base64 import b64decode
from html.parser import HTMLParser

import pytest

from lightning_plugins.reporting.report import Figure, Table, Text, write_report

HOSTILE = "<script>alert('x')</script> & \"quotes\" {{ 7 * 7 }}"


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.text, self.policy, self.open = [], [], {}, "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        self.policy += dict(attributes).get("content", "") if dict(attributes).get("http-equiv") else ""
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and data.strip():
            self.text.setdefault(self.open[-1], []).append(data)


@pytest.fixture
def page(tmp_path):
    sections = [
        Text(["first", HOSTILE], heading="Summary"),
        Table([{HOSTILE: "student", "abs_rel": 0.123456}], caption=HOSTILE, heading="Scores"),
        Figure(b"\x89PNG bytes", HOSTILE, heading="Samples"),
    ]
    write_report(tmp_path / "report.html", HOSTILE, sections)
    return Page(tmp_path / "report.html")


def test_nothing_comes_from_elsewhere(page):
    assert [link.partition(",")[0] for link in page.links] == ["data:image/png;base64"]
    assert b64decode(page.links[0].partition(",")[2]) == b"\x89PNG bytes"
    assert page.policy.startswith("default-src 'none'")
    assert "url(" not in "".join(page.text["style"])
    assert "@import" not in "".join(page.text["style"])


def test_hostile_text_is_text(page):
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text["title"] == [HOSTILE]
    assert page.text["h1"] == [HOSTILE]
    assert page.text["th"] == [HOSTILE, "abs_rel"]
    assert page.text["p"] == ["first", HOSTILE, HOSTILE]
    assert page.text["figcaption"] == [HOSTILE]
    assert next(attributes for tag, attributes in page.tags if tag == "img")["alt"] == HOSTILE


def test_headings_and_numbers(page):
    assert page.text["h2"] == ["Summary", "Scores", "Samples"]
    cells = [
        (attributes.get("class"), text)
        for (tag, attributes), text in zip([t for t in page.tags if t[0] == "td"], page.text["td"], strict=True)
    ]
    assert cells == [(None, "student"), ("number", "0.1235")]


def test_a_failed_report_leaves_the_earlier_one(tmp_path):
    write_report(tmp_path / "report.html", "first", [])
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(TypeError):
        write_report(tmp_path / "report.html", "second", [Table([1])])
    assert (tmp_path / "report.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
