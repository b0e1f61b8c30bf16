import pytest

pytest.importorskip("safetensors")
from toy_stack import half, processes, toy, uninterrupted, warned  # noqa: F401


@pytest.fixture
def start(processes):  # noqa: F811
    """Start a real process, as a function of what it calls and its arguments; none outlives its test."""
    started = []

    def start(target, *arguments):
        process = processes.Process(target=target, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
