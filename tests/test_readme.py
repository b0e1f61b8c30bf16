"""The README's Python runs as it stands, and its commands are those of the check."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run_and_show_what_they_say():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(block, names)
    assert [line.split()[0] for line in printed.getvalue().splitlines()] == ["0", "100", "200", "300"]
    assert all(line.endswith("ok") for line in printed.getvalue().splitlines())
    assert names["forecast"].step > 600


def test_the_check_is_the_second_command():
    second = re.findall(r"```bash\n(.*?)\n```", README)[1]
    script = (ROOT / ".ci" / "run").read_text()
    assert all(part.strip() in script.replace("--quiet", "-q") for part in second.split("&&"))


def test_links_point_to_files_that_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


def test_every_number_of_a_bullet_about_the_paper_is_in_the_recorded_results():
    bullets = README.partition("## What is not so in the paper")[2].partition("[docs/mathematics.md]")[0]
    pages = ("results.md", "results-nearest.md")
    results = "".join((ROOT / "docs" / page).read_text() for page in pages).replace("−", "-")
    found = re.findall(r"-?\d[\d,]*\.?\d*", re.sub(r"`[^`]*`", "", bullets))
    assert len(found) > 15
    known = {each.rstrip(".,") for each in re.findall(r"-?\d[\d,]*\.?\d*", results)}
    assert [n for n in (each.rstrip(".,") for each in found) if n not in known] == []
