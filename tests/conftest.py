"""Set-up shared by all tests: one thread, the Triton interpreter where there is no GPU, and `--device`."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Must be set before a kernel is decorated, that is before anything imports fastent.kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# The products of the tests are small: a second thread costs more than it brings, much more on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where the tests put their tensors"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))
