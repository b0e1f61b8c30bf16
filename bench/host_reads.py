"""How often the host reads tensors in a call: each time is a synchronisation where the activations lie on a GPU.

Counted on the CPU, where nothing has to wait: numbers taken from a tensor, tensors handed to NumPy, and
torch's decompositions, whose status the host reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READING = ("aten._local_scalar_dense", "aten._linalg_eigh", "aten._linalg_svd", "aten.nonzero", "aten.equal")


class _Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func).startswith(READING)
        return func(*args, **(kwargs or {}))


def host_reads(call: Callable[[], object]) -> int:
    """Count the reads of one call."""
    numpy = Tensor.numpy
    reads = _Reads()

    def counted(self: Tensor, **options: Any) -> Any:
        reads.count += 1
        return numpy(self, **options)

    with reads, patch.object(Tensor, "numpy", counted):
        call()
    return reads.count
