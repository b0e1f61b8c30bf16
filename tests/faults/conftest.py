import pytest

pytest.importorskip("safetensors")
from toy_stack import half, processes, toy, uninterrupted, warned  # noqa: F401
from victims import answer


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


@pytest.fixture
def elsewhere(start, processes):  # noqa: F811
    """What a function returns that is called in a process of its own: one thread, which may fork, and no pytest."""

    def call(function, *arguments):
        ours, theirs = processes.Pipe()
        start(answer, theirs, function, arguments)
        theirs.close()
        result, error = ours.recv()
        assert not error, error
        return result

    return call
