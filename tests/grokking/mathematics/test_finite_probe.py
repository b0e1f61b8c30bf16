"""The bias of H and its correction, as documented: the check, and the table of the page."""

import numpy as np
import pytest

from fastent.grokking.mathematics import checks
from fastent.reference.sampling import sampling_bias


def test_bias_formula_predicts_the_bias_of_samples():
    evidence = checks.bias_of_samples()
    assert evidence.holds, evidence.text


def test_table_of_the_documentation_has_a_line_for_each_spectrum_and_size(capsys):
    checks.main(["--features", "8", "--sizes", "16", "32", "--draws", "40"])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 + 2 * len(checks.SPECTRA)
    assert {len(line) for line in lines} == {8}
    flat = [cell.strip() for cell in lines[7]]
    assert flat[:3] == ["32", "flat", "1.000"]
    assert flat[4] == f"{sampling_bias(np.ones(8), 32) / np.log(8):+.4f}"
    assert float(flat[3]) == pytest.approx(float(flat[4]), rel=0.25)
    assert abs(float(flat[5].split("±")[0])) < 0.3 * abs(float(flat[3]))
