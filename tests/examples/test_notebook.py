"""The notebook has the outputs that its execution gives.

``python tests/examples/test_notebook.py`` executes it and writes them.
"""

import contextlib
import io
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_look.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def said(cell):
    """What a cell printed, and its value as text with the forms that are no text: pictures differ by matplotlib."""
    return [
        "".join(output["text"])
        if output["output_type"] == "stream"
        else ("".join(output["data"]["text/plain"]), sorted(output["data"]))
        for output in cell["outputs"]
    ]


def executed():
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, kernel_name="python3", timeout=300, record_timing=False).execute()
    return notebook


def test_the_code_runs_and_prints_what_is_committed_but_for_the_steps_left_out():
    pytest.importorskip("matplotlib")
    names: dict = {}
    for cell in CODE:
        source = "".join(cell["source"]).replace("steps = 600", "steps = 20")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(source, names)
        if "steps = 600" in "".join(cell["source"]):
            break
        assert [printed.getvalue()] * bool(printed.getvalue()) == [
            "".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"
        ]
    assert [record.step for record in names["monitor"].history] == [0, 0, 20, 20]


def test_two_cells_show_a_picture_and_all_were_executed_in_order():
    pictures = [cell for cell in CODE if any("image/png" in o.get("data", {}) for o in cell["outputs"])]
    assert len(pictures) == 2
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.nightly
def test_its_execution_gives_the_outputs_that_are_committed():
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    found = [cell for cell in executed().cells if cell.cell_type == "code"]
    assert [said(cell) for cell in found] == [said(cell) for cell in CODE]


if __name__ == "__main__":
    import nbformat

    nbformat.write(executed(), NOTEBOOK)
