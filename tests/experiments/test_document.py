"""The report's two renderings: well formed, escaped, complete, and free of anything outside."""

import base64
import re
from html.parser import HTMLParser

import pytest

from fastent.experiments.document import (
    Code,
    Figure,
    Items,
    Section,
    Table,
    Text,
    Verdict,
    as_html,
    as_markdown,
    figures_of,
)

EVIL = '<script>alert("x")</script> & <b>'
VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Balanced(HTMLParser):
    """Fails on an element that closes another's; collects tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


SVG = '<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0"/></svg>'
SECTION = Section(
    "first",
    "A `section`",
    (
        Text(EVIL),
        Text("remark", "note"),
        Items(("one", "two *not bold*")),
        Code("fastent run <e1> & ```"),
        Table("Caption", ("a", "b|c"), ((EVIL, Verdict("no", "not so")), ("1", "x | y")), numbers=(0,)),
        Figure("picture", "what it shows", 'alt "quoted"', SVG, SVG.replace("M0 0", "M1 1")),
    ),
)


def test_html_is_balanced_and_holds_every_text_with_its_tags_escaped():
    page = as_html("Title", EVIL, [SECTION])
    parsed = parse(page)
    text = "".join(parsed.text)
    assert "script" not in parsed.tags
    assert "b" not in parsed.tags
    assert text.count(EVIL) == 3
    assert "fastent run <e1> & ```" in text
    assert ("span", "class", "verdict no") in parsed.attributes
    assert ("img", "alt", 'alt "quoted"') in parsed.attributes
    assert "<code>section</code>" in page


def test_figures_are_embedded_once_for_light_and_once_for_dark():
    parsed = parse(as_html("Title", "", [SECTION]))
    sources = {tag: value for tag, key, value in parsed.attributes if key in ("src", "srcset")}
    for tag, mark in (("img", "M0 0"), ("source", "M1 1")):
        head, _, data = sources[tag].partition(",")
        assert head == "data:image/svg+xml;base64"
        assert mark in base64.b64decode(data).decode()
    assert ("source", "media", "screen and (prefers-color-scheme: dark)") in parsed.attributes


def test_html_refers_to_nothing_outside_itself():
    page = as_html("Title", "", [SECTION])
    parsed = parse(page)
    references = [v for _, key, v in parsed.attributes if key in ("src", "srcset", "href", "xlink:href")]
    assert references
    assert all(value.startswith(("data:", "#")) for value in references)
    assert not {"script", "link", "iframe", "object", "embed"} & set(parsed.tags)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style


def test_links_of_the_page_lead_to_its_sections():
    parsed = parse(as_html("Title", "", [SECTION]))
    assert ("a", "href", "#first") in parsed.attributes
    assert ("section", "id", "first") in parsed.attributes


def test_markdown_tables_keep_their_columns_whatever_the_cells_hold():
    text = as_markdown("Title", "", [SECTION])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3}
    assert table[1] == "| ---: | --- |"


def test_markdown_escapes_tags_and_marks_and_links_the_figure():
    text = as_markdown("Title", "", [SECTION])
    outside = re.sub(r"^(`{3,})\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in outside
    assert "&lt;script&gt;" in outside
    assert r"two \*not bold\*" in text
    assert "](figures/picture.svg)" in text
    assert "````\nfastent run <e1> & ```\n````" in text


def test_a_row_of_another_length_than_the_columns_is_refused():
    with pytest.raises(ValueError, match=r"needs 2 cells.*got 1"):
        Table("c", ("a", "b"), (("only",),))


def test_figures_of_gives_all_in_order():
    assert [f.name for f in figures_of([SECTION, SECTION])] == ["picture", "picture"]


def test_per_cent_signs_and_n_stay_with_their_numbers():
    page = as_html("Title", "", [Section("s", "S", (Text("95 % CI 1 to 2; n = 3"),))])
    assert "95&nbsp;% CI 1 to 2; n&nbsp;=&nbsp;3" in page
