"""Set-up shared by all tests: one thread, Triton's interpreter or compiled kernels, `--device`, faults' figures."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

# The products of the tests are small: a second thread costs more than it brings, much more on a busy machine. Before
# torch is there: which library serves a product is decided then, and a test's processes must have the same.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from fault_figures import Faults

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where the tests put their tensors"
    )


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("fastent.reference") is None:
        pytest.exit(
            "this clone has no links fastent/kernels and fastent/reference, so nothing finds these two folders; "
            "type: pip install -e .",
            returncode=4,
        )
    # Before a kernel is decorated, that is before anything imports fastent.kernels. A process either compiles
    # kernels or interprets them: with a GPU, `--device cuda` or `-m gpu` asks for compiled ones.
    asked = config.getoption("--device") == "cuda" or config.getoption("markexpr") == "gpu"
    if not (asked and torch.cuda.is_available()):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    path = os.environ.get("FASTENT_FAULTS")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Faults(Path(path)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "torch.cuda.is_available() is False"
    elif interpreted:
        reasons["gpu"] = "kernels are interpreted in this process: give --device cuda"
    if not interpreted:
        reasons["interpreter"] = "kernels are compiled in this process: leave --device cuda out"
    for item in items:
        for marker in reasons.keys() & item.keywords.keys():
            item.add_marker(pytest.mark.skip(reason=reasons[marker]))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[int, str, int, int], None]:
    """Take down that of `tried` faults of a row all were survived; the session `faults` writes it to a file."""

    def figure(row: int, what: str, tried: int, survived: int) -> None:
        assert survived == tried > 0, f"{what}: {survived} of {tried} survived"
        request.node.user_properties.append(
            ("fault", {"row": row, "what": what, "tried": tried, "survived": survived})
        )

    return figure
