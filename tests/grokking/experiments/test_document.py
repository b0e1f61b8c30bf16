"""The report's two renderings: well formed, escaped, complete, and free of anything outside.

Documents that take in parts of the report, and whether they still follow from the runs.
"""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fastent.cli import main
from fastent.grokking.experiments.document import (
    Code,
    Figure,
    Group,
    Items,
    Link,
    Links,
    Section,
    Table,
    Text,
    Verdict,
    as_html,
    as_markdown,
    documents,
    figures_of,
)
from fastent.grokking.experiments.report import check_documents, fill_documents
from fastent.grokking.train.storage import RunError

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
        Text("two *not bold*"),
        Code("fastent run <e1> & ```"),
        Table("Caption", ("a", "b|c"), ((EVIL, Verdict.NOT_REPRODUCED), ("1", "x | y")), numbers=(0,)),
        Figure("picture", "what it shows", 'alt "quoted"', lambda: (SVG, SVG.replace("M0 0", "M1 1"))),
        Items((("one ", Link("E1", "folded")), "two")),
        Group(
            "folded",
            (f"all of it {EVIL} ", Verdict.IN_PART),
            (Text(("see ", Link("the picture", "picture"))),),
        ),
        Text(Link("elsewhere", "nowhere")),
        Links((Link("the first", "first"), Link("not here", "nowhere"))),
        Links((Link("not here", "nowhere"),)),
    ),
)


def test_html_is_balanced_and_holds_every_text_with_its_tags_escaped():
    page = as_html("Title", EVIL, [SECTION])
    parsed = parse(page)
    text = "".join(parsed.text)
    assert "script" not in parsed.tags
    assert "b" not in parsed.tags
    assert text.count(EVIL) == 4
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


def test_links_of_the_page_lead_to_its_sections_groups_and_figures():
    parsed = parse(as_html("Title", "", [SECTION]))
    assert ("a", "href", "#first") in parsed.attributes
    places = {("section", "first"), ("details", "folded"), ("figure", "picture")}
    assert {(tag, value) for tag, key, value in parsed.attributes if key == "id"} == places
    assert ("a", "href", "#folded") in parsed.attributes
    assert ("a", "href", "#picture") in parsed.attributes


def test_markdown_links_lead_where_there_is_something_and_are_plain_words_elsewhere():
    text = as_markdown("Title", "", [SECTION])
    assert "1. one [E1](#folded)\n2. two" in text
    places = re.findall(r'<a id="(\w+)"></a>', text)
    assert places == ["first", "picture", "folded"]
    assert "[the picture](#picture)" in text
    assert "\nelsewhere\n" in text
    assert text.endswith("\n\nSee [the first](#first).\n")
    assert "<details>\n<summary>all of it &lt;script&gt;" in text
    assert "in part</summary>\n\nsee [the picture]" in text
    assert text.count("<details>") == text.count("</details>") == 1


def test_a_group_of_the_page_is_folded_and_its_line_is_in_words_and_a_verdict():
    page = as_html("Title", "", [SECTION])
    assert '<details id="folded"><summary>all of it &lt;script&gt;' in page
    assert '<span class="verdict part">in part</span></summary>' in page


def test_tables_figures_and_code_can_be_scrolled_by_keyboard_and_words_become_cards():
    words = Section("s", "S", (Table("c", ("a", "b"), (("1", "2"),)), Code("long")))
    page = as_html("Title", "", [SECTION, words])
    assert page.count('<div class="scroll" tabindex="0"><table') == 2
    assert page.count('<div class="scroll" tabindex="0"><picture>') == 1
    assert page.count('<pre tabindex="0">') == 2
    # A table with numbers stays one; of one of words each cell knows its column's name.
    assert '<table class="words">' in page
    assert '<td data-of="a">1</td><td data-of="b">2</td>' in page
    assert page.count('class="words"') == 1


def test_contents_name_sections_by_what_stands_before_a_colon():
    page = as_html("Title", "", [Section("e1", "E1: does it?", ())])
    assert '<li><a href="#e1">E1</a></li>' in page
    assert "<h2>E1: does it?</h2>" in page


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


HOSTILE = (
    "\n\n<img src=x onerror=alert(1)>\n\n",
    "\r\r<b>\x85\u2028<b>",
    "`<img src=x onerror=alert(1)>",
    "``<b>`",
    "a`<b>`c",
    "a\\`<b>`",
    r"x\|<img src=x onerror=alert(1)>",
    r"\|<b>|\\|",
    "</code><script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](https://elsewhere.example/pixel.png)",
    "<!-- fastent report: end -->",
    "\n- a\n# b\n```\n<b>\n",
    "\udc80\x1b[2J\u202e\x00",
    "_a_ *b* ~c~",
)


def elements(markdown):
    """Raw HTML in Markdown as CommonMark's own parser finds it, and where links and pictures lead."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    inner = [child for token in tokens for child in (token, *(token.children or ()))]
    raw = [token.content for token in inner if token.type in ("html_inline", "html_block")]
    return " ".join(raw), [str(value) for token in inner for value in (token.attrs or {}).values()]


def around(text):
    """Every place of a page that text of a file comes to, as code and as it is."""
    return Section(
        "first",
        "Title",
        (
            Text(text),
            Text((f"a `{text}` b", f"{text} `{text}`"), "note"),
            Items((text, f"`{text}`")),
            Table(text, ("a", text), ((text, f"`{text}`"), (f"x {text} y", "z")), numbers=(0,)),
            Code(text),
            Group("folded", f"`{text}`", (Text(text),)),
            Figure("picture", text, text, lambda: (SVG, SVG)),
        ),
    )


def held_harmless(text):
    page, markdown = as_html("T", "s", [around(text)]), as_markdown("T", "s", [around(text)])
    parsed, plain = parse(page), parse(as_html("T", "s", [around("plain")]))
    assert [tag for tag in parsed.tags if tag != "code"] == [tag for tag in plain.tags if tag != "code"]
    assert {name for _, name, _ in parsed.attributes} == {name for _, name, _ in plain.attributes}
    raw, leads = elements(markdown)
    tags = re.findall(r"<!--|</?[a-zA-Z][^>]*>", raw)
    ours = {'<a id="first">', '<a id="folded">', '<a id="picture">', "</a>"}
    assert set(tags) <= ours | {"<details>", "</details>", "<summary>", "</summary>", "<code>", "</code>"}
    assert set(leads) <= {"figures/picture.svg", "", "text-align:right", "1"}
    assert page.encode()
    assert markdown.encode()


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_a_name_holds_makes_no_element_no_link_and_no_picture(text):
    held_harmless(text)


MARKS = ("`", "\\", "|", "<b>", "</code>", "\n", "\r", "![", "](", ")", "_", "&lt;", " ", "a")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(MARKS)).map("".join))
def test_no_combination_of_marks_in_a_name_makes_an_element(text):
    held_harmless(text)


def test_a_name_makes_one_cell_and_is_read_as_it_is():
    names = ("a|b", r"a\|b", "a`|`b", "c\n| d |")
    markdown = as_markdown(
        "T", "s", [Section("x", "X", (Table("", ("n",), tuple((f"`{n}`",) for n in names)),))]
    )
    cells = [
        "".join(child.content for child in token.children if child.type != "html_inline")
        for token in MarkdownIt("commonmark").enable("table").parse(markdown)
        if token.type == "inline" and token.map and token.level == 4
    ]
    assert cells == ["n", "a|b", r"a\|b", "a|b", "c | d |"]


def test_the_path_of_a_figure_is_quoted():
    (figure,) = figures_of([SECTION])
    markdown = as_markdown("T", "s", [Section("x", "X", (figure,))], "figures/my runs (1)")
    assert "(figures/my%20runs%20%281%29/picture.svg)" in markdown


def test_a_row_of_another_length_than_the_columns_is_refused():
    with pytest.raises(ValueError, match=r"needs 2 cells.*got 1"):
        Table("c", ("a", "b"), (("only",),))


def test_figures_of_gives_all_in_order_and_none_is_drawn_before_it_is_asked_for():
    assert [f.name for f in figures_of([SECTION, SECTION])] == ["picture", "picture"]
    drawn = []
    figure = Figure("picture", "", "", lambda: drawn.append(1) or ("light", "dark"))
    as_markdown("Title", "", [Section("s", "S", (figure,))])
    assert drawn == []
    assert (figure.light, figure.dark, drawn) == ("light", "dark", [1])


def test_per_cent_signs_and_n_stay_with_their_numbers():
    page = as_html("Title", "", [Section("s", "S", (Text("95 % CI 1 to 2; n = 3"),))])
    assert "95&nbsp;% CI 1 to 2; n&nbsp;=&nbsp;3" in page


PLACE = "# Results\n\nBefore.\n\n<!-- fastent report: {} -->\nold\n<!-- fastent report: end -->\n\nAfter.\n"


@pytest.fixture
def document(three_runs, tmp_path):
    path = tmp_path / "docs" / "results.md"
    path.parent.mkdir()
    path.write_text(PLACE.format("e1") + PLACE.format("summary"))
    fill_documents(three_runs, [path])
    return path


def test_a_filled_document_holds_the_sections_and_their_figures_and_keeps_the_rest(document):
    text = document.read_text()
    assert text.startswith('# Results\n\nBefore.\n\n<!-- fastent report: e1 -->\n\n<a id="e1"></a>\n')
    assert text.count("After.") == 2
    assert "old" not in text.splitlines()
    assert "| 0 | 300 | 1,500 | 1,500 | 0.635 | 1,600 | −100 |" in text
    assert "runs of E1, seeds 0-2" in text
    linked = re.findall(r"\]\((figures/runs/[^)]+)\)", text)
    assert "figures/runs/e1-dynamics.svg" in linked
    assert all((document.parent / link).read_text().startswith("<svg") for link in linked)
    # Claims are in another section, which this document does not take in.
    assert "](#e1-dynamics)" in text
    assert "](#claims" not in text


def test_a_figure_that_is_not_there_is_a_difference(three_runs, document):
    figure = document.parent / "figures" / "runs" / "e1-dynamics.svg"
    figure.unlink()
    (line,) = check_documents(three_runs, [document])
    assert line == f"{figure} is not there: `fastent report` with --fill draws it"


def test_a_document_that_follows_from_its_runs_has_no_difference(three_runs, document):
    assert check_documents(three_runs, [document]) == []


def test_an_edited_number_and_a_changed_run_are_found(three_runs, document):
    text = document.read_text()
    document.write_text(text.replace("| 0 | 300 | 1,500 |", "| 0 | 300 | 1,400 |"))
    found = check_documents(three_runs, [document])
    assert any(line.startswith("-| 0 | 300 | 1,400 |") for line in found)
    assert any(line.startswith("+| 0 | 300 | 1,500 |") for line in found)
    document.write_text(text)
    metrics = three_runs / "e1-baseline-add-seed2" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[20]["test_accuracy"] = 0.995
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any(line.startswith("+| 2 | 300 | 1,000 |") for line in check_documents(three_runs, [document]))


def test_a_section_that_the_runs_do_not_give_and_a_document_without_a_place_are_refused(three_runs, document):
    document.write_text(PLACE.format("e2"))
    with pytest.raises(
        RunError, match=r"takes in the section 'e2', which these runs do not give; there are summary"
    ):
        check_documents(three_runs, [document])
    document.write_text("# Nothing\n")
    with pytest.raises(RunError, match="takes in no part of the report"):
        fill_documents(three_runs, [document])


MARK, END = "<!-- fastent report: e1 -->", "<!-- fastent report: end -->"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{MARK}\nold\n", "line 1 has no end: put <!-- fastent report: end --> below it"),
        (f"# A\n{MARK}\nmine\n{MARK}\nold\n{END}\n", "line 2 has no end"),
        (f"{END}\n{MARK}\nold\n{END}\n", "end --> in line 1 ends nothing"),
        (f"{MARK}\nold\n{END}\n{END}\n", "end --> in line 4 ends nothing"),
        (f"{MARK}\nold\n{END}\n\udcff", "is no text in UTF-8: "),
    ],
)
def test_a_document_whose_marks_do_not_pair_or_that_is_no_text_is_named_and_none_is_written(
    three_runs, document, text, said
):
    before = document.read_bytes()
    other = document.with_name("other.md")
    other.write_bytes(text.encode(errors="surrogateescape"))
    document.write_bytes(stale := before.replace(b"1,500", b"1,400"))
    for act in (fill_documents, check_documents):
        with pytest.raises(RunError, match=rf"{re.escape(str(other))}.*{re.escape(said)}"):
            act(three_runs, [document, other])
    assert document.read_bytes() == stale
    assert other.read_bytes() == text.encode(errors="surrogateescape")


def test_what_follows_a_mark_in_its_line_is_made_anew_too(three_runs, document):
    right = document.read_bytes()
    document.write_bytes(right.replace(f"{MARK}\n".encode(), f"{MARK} \n".encode()))
    assert check_documents(three_runs, [document])
    fill_documents(three_runs, [document])
    assert document.read_bytes() == right


def test_documents_are_the_readme_and_those_below_docs_that_have_a_place(tmp_path, document):
    (tmp_path / "README.md").write_text("# No place\n")
    (tmp_path / "docs" / "deep").mkdir()
    (tmp_path / "docs" / "deep" / "more.md").write_text(PLACE.format("e1"))
    (tmp_path / "docs" / "other.md").write_text("text\n")
    assert documents(tmp_path, tmp_path / "runs") == [tmp_path / "docs" / "deep" / "more.md", document]


def test_a_document_that_names_its_runs_is_of_those_alone(tmp_path, document):
    named = tmp_path / "docs" / "named.md"
    named.write_text("<!-- fastent report of rows/nearest -->\n" + PLACE.format("e1"))
    assert documents(tmp_path, tmp_path / "rows" / "nearest") == [named, document]
    assert documents(tmp_path, tmp_path / "rows" / "paper") == [document]


def test_the_command_fails_exactly_when_a_document_differs(
    three_runs, document, capsys, monkeypatch, tmp_path
):
    pytest.importorskip("tyro")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(three_runs), "--check"]) == 0
    assert capsys.readouterr().out == f"{Path('docs/results.md')}: as the runs say\n"
    document.write_text(document.read_text().replace("1,500", "1,501"))
    assert main(["report", str(three_runs), "--check", "docs/results.md"]) == 1
    assert "1,501" in capsys.readouterr().out
    assert main(["report", str(three_runs), "--fill"]) == 0
    assert main(["report", str(three_runs), "--check"]) == 0
    assert not (tmp_path / "report").exists()
    document.unlink()
    capsys.readouterr()
    assert main(["report", str(three_runs), "--check"]) == 1
    assert "hold no part of the report" in capsys.readouterr().err


ROOT = Path(__file__).parents[3]
RECORDED = [path.parent for path in sorted(ROOT.glob("bench/results/*/e1-baseline-add.parquet"))]


@pytest.mark.parametrize("runs", RECORDED, ids=lambda runs: runs.name)
def test_the_committed_tables_of_this_project_follow_from_its_committed_runs(runs):
    committed = documents(ROOT, runs)
    assert committed
    assert "\n".join(check_documents(runs, committed)) == ""
