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


def numbers(text: str) -> list[str]:
    return [each.rstrip(".,") for each in re.findall(r"-?\d[\d,]*\.?\d*", text.replace("\u2212", "-"))]


def test_every_number_of_a_bullet_about_the_paper_is_in_the_recorded_results():
    bullets = README.partition("## What is not so in the paper")[2].partition("[docs/mathematics.md]")[0]
    paper, cut, nearest = bullets.partition("- **No setting of 96")
    assert cut
    for text, page, least in ((paper, "results.md", 15), (nearest, "results-nearest.md", 7)):
        found = numbers(re.sub(r"`[^`]*`|\([^()]*\.md\)", "", text))
        assert len(found) > least
        known = set(numbers((ROOT / "docs" / page).read_text()))
        assert [each for each in found if each not in known] == []
