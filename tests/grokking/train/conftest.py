import pytest

pytest.importorskip("safetensors")
from toy_stack import half, processes, toy, uninterrupted, warned  # noqa: F401
