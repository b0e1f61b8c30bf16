"""The reference stands on NumPy alone: a bug of torch or of the package cannot hide in both."""

import subprocess
import sys
from pathlib import Path

import fastent.reference

FOLDER = Path(fastent.reference.__file__).parent

# Loaded under another name, so that `fastent`, whose public names need torch, is not imported on the way.
PROGRAM = """
import importlib, importlib.util, pathlib, sys
import numpy
for name in ("torch", "triton", "scipy", "fastent"):
    sys.modules[name] = None  # importing it now raises
before = set(sys.modules)
folder = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location(
    "alone", folder / "__init__.py", submodule_search_locations=[str(folder)]
)
sys.modules["alone"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
for name in names:
    importlib.import_module(f"alone.{name}")
entropy = sys.modules["alone.entropy"].spectral_entropy([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
loaded = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(names, sorted(loaded - {"numpy"}), entropy.normalized)
"""


def test_reference_runs_with_numpy_alone() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(FOLDER)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    names = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    assert {"covariance", "entropy", "mixing", "moments"} <= set(names)
    assert result.stdout.strip() == f"{names} ['alone'] 1.0"
