"""A wheel built from the tree installs elsewhere and works there, with its mapped packages."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE = """
import sys
from pathlib import Path
# An editable install of the tree would step in for what the wheel lacks.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, fastent, fastent.kernels, fastent.reference.entropy, fastent.train, fastent.grokking.experiments
here = Path(sys.argv[1])
for module in (fastent, fastent.kernels, fastent.reference.entropy, fastent.train):
    assert Path(module.__file__).is_relative_to(here), module.__file__
h = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ours = fastent.spectral_entropy(h).entropy
triton = fastent.spectral_entropy(h, backend="triton").entropy
assert abs(ours - triton) < 1e-13
print(ours)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # A copy of the tracked files: the build leaves its folders where it runs.
    source = out / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, files.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys, setuptools.build_meta as build; print(build.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True)
    (path,) = out.glob("fastent-*.whl")
    return path


def test_the_wheel_holds_the_packages_and_no_top_level_module_but_fastent(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"fastent", next(name for name in top if name.endswith(".dist-info"))}
    assert {"fastent/py.typed", "fastent/kernels/covariance.py", "fastent/reference/entropy.py"} <= set(names)


def test_the_wheel_works_where_the_tree_is_not(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-P", "-c", USE, str(tmp_path / "site")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 1.0
