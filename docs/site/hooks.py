"""The hooks of mkdocs.yml: the site has the repository's paths, formulas as MathML, a reference of every public name.

Links between README, docs/ and code are written for a code host. So that they hold on the site too, it keeps the paths
of the repository: README.md, docs/ and what they link to, source files as pages that show their text.
"""

import json
import logging
import re
from importlib.metadata import distribution
from pathlib import Path

import griffe
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from math_core import LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LOG = logging.getLogger("mkdocs.hooks.site")  # its warnings fail a strict build
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s:]+)[)#\s]")
LOADED = re.compile(r'<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)="?(?:https?:)?//[^>]*>')
SHOWN = {".cff", ".ipynb", ".py", ".sh", ".toml", ".txt"}
DOCUMENTED = (
    *("fastent", "fastent.forecast", "fastent.integrations", "fastent.testing", "fastent.reference"),
    "fastent.grokking.experiments.tables",  # load_runs, which importing fastent does not bring
)
FONT = Path(str(distribution("ziamath").locate_file("ziamath/fonts/STIXTwoMath-Regular.ttf")))
mathml = LatexToMathML().convert_with_local_state  # an error where it knows no such command


class Source(File):
    """A source file or a folder that is a page."""

    def is_documentation_page(self) -> bool:
        """Yes, whatever its suffix."""
        return True


def fenced(text: str, language: str) -> str:
    """Block of code."""
    return f"~~~~~~{language}\n{text}\n~~~~~~"


def listing(path: Path) -> str:
    """Page of a source file, of a notebook or of a folder: its text, its cells or the names in it."""
    title = f"# `{path.relative_to(ROOT).as_posix()}`"
    if path.is_dir():
        names = sorted(each.name for each in path.glob("[!.]*[!_]"))  # without __pycache__
        parts = [title, fenced("\n".join(names), "text")]
    elif path.suffix == ".ipynb":
        cells = [
            (cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]
        ]
        parts = [fenced(text, "python") if kind == "code" else text for kind, text in cells]
    else:
        parts = [title, fenced(path.read_text(), {".py": "python", ".sh": "bash"}.get(path.suffix, "text"))]
    return "\n\n".join(["---\nsearch: {exclude: true}\n---", *parts])


def linked(path: Path) -> list[Path]:
    """Paths that a page of the repository links to."""
    text = CODE.sub("", path.read_text())
    return [(path.parent / target).resolve() for target in LINK.findall(text)]


def file_of(path: Path, config: MkDocsConfig) -> File:
    """File of the repository at the same path of the site."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir() or path.suffix in SHOWN:
        file = Source(name, None, config.site_dir, config.use_directory_urls)
        file.content_string = listing(path)
        return file
    return File(name, str(ROOT), config.site_dir, config.use_directory_urls)


def reference(module: griffe.Module) -> str:
    """Page of a module: its exports, or its modules, or itself."""
    if not module.exports and not module.modules:
        return f"# {module.path}\n\n::: {module.path}\n    options: {{show_root_heading: false}}\n"
    names = [name for name in module.exports or sorted(module.modules) if not name.startswith("_")]
    full = "true" if not module.exports else "false"
    entries = [f"::: {module.path}.{name}\n    options: {{show_root_full_path: {full}}}\n" for name in names]
    return "\n\n".join([f"# {module.path}", module.docstring.value, *entries])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Files of the repository that the site shows and generated pages, in place of docs/ alone."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    waiting, found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], set()
    while waiting:
        path = waiting.pop()
        if path in found or not path.exists():  # a link to nothing is reported where it stands
            continue
        found.add(path)
        files.append(file_of(path, config))
        if path.suffix == ".md":
            waiting += linked(path)
    for name in ("site.css", "iframe-worker.js"):
        files.append(file_of(HERE / name, config))
    files.append(File.generated(config, f"docs/site/{FONT.name}", abs_src_path=str(FONT)))
    package = griffe.load("fastent", search_paths=[ROOT])
    for name in DOCUMENTED:
        module = package if name == "fastent" else package[name.removeprefix("fastent.")]
        files.append(File.generated(config, f"api/{name}.md", content=reference(module)))
    return files


class Formula(InlineProcessor):
    """A formula between a dollar sign with a backtick and the reverse, as code hosts have it."""

    def handleMatch(self, match: re.Match[str], data: str) -> tuple[str, int, int]:
        """MathML in its place."""
        return self.md.htmlStash.store(mathml(match[1], displaystyle=False)), match.start(0), match.end(0)


class Formulas(Extension):
    """Formulas in the text."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Before code spans are found, whose priority is 190."""
        md.inlinePatterns.register(Formula(r"\$`([^`]+)`\$", md), "formula", 200)


def formula(source: str, *_: object, **__: object) -> str:
    """MathML of a fence of the language `math`."""
    return f'<div class="formula">{mathml(source, displaystyle=True)}</div>'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add both ways to write a formula."""
    config.markdown_extensions.append(Formulas())
    fence = {"name": "math", "class": "formula", "format": formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_page_markdown(markdown: str, **_: object) -> str:
    """Text within <details> is Markdown, as on a code host."""
    return markdown.replace("<details>", '<details markdown="1">')


def on_post_page(output: str, page: object, **_: object) -> str:
    """Page as it is; what it would fetch from elsewhere is a warning."""
    for tag in LOADED.findall(output):
        LOG.warning("%s loads from elsewhere: %s", page, tag)
    return output
