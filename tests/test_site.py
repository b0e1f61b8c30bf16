"""The site's navigation has every page of docs/, and the gallery every committed figure below commands that exist."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = (ROOT / "fastent" / "cli.py").read_text()
GALLERY = (ROOT / "docs" / "gallery.md").read_text()


def test_every_page_of_the_documentation_is_in_the_navigation_once():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = Counter(re.findall(r"docs/.+\.md", navigation))
    assert listed == Counter(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def test_the_gallery_shows_every_figure_once():
    figures = [
        path
        for folder in ("docs/figures", "bench/results/cpu")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".png", ".svg")
    ]
    shown = re.findall(r"!\[.+?\]\((.+?)\)", GALLERY)
    assert Counter((ROOT / "docs" / target).resolve() for target in shown) == Counter(figures)


def exists(command: str) -> bool:
    program, *words = command.split()
    if program == "fastent":
        return f"\ndef {words[0]}(" in COMMANDS
    if words[0] == "-m":
        return importlib.util.find_spec(words[1]) is not None
    return (ROOT / words[0]).is_file()


def test_each_section_of_the_gallery_has_commands_that_exist_and_figures_below_them():
    for section in re.split(r"^## ", GALLERY, flags=re.MULTILINE)[1:]:
        commands, _, figures = section.partition("```\n")[2].partition("```")
        assert [line for line in commands.splitlines() if not exists(line)] == []
        assert "![" not in commands
        assert "![" in figures
