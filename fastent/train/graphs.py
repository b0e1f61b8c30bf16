"""A training step launched as one CUDA graph, whose data for many steps lie on the device beforehand.

A step of these models is some 150 kernels of a few microseconds: launched one by one they wait for the host. A
graph launches them at once. What differs from step to step is read on the device: the inputs of the next
`WINDOW` steps are put there together, and a counter that the graph itself moves on says which of them is next.
So the host may run ahead, and prepares a window while the steps of the one before are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

WINDOW = 256
"""Steps whose inputs are prepared together: 32 MiB of batches for 32 seeds and 512 pairs."""

T = TypeVar("T")
Launch = Callable[[], object]
Capture = Callable[[Callable[[], Any], Sequence[Tensor]], tuple[Launch, Any]]
"""Record a function and return what launches it again, and its result's place. Tensors to restore are given."""

_WARM_UP = 3  # launches before the capture: libraries allocate their workspaces at the first


def capture_cuda_graph(function: Callable[[], T], state: Sequence[Tensor] = ()) -> tuple[Launch, T]:
    """Capture `function`, which reads nothing on the host, as a CUDA graph; `state` is left as it was found."""
    saved = [tensor.clone() for tensor in state]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    for tensor, before in zip(state, saved, strict=True):
        tensor.copy_(before)
    graph = torch.cuda.CUDAGraph()
    # Other threads may query events meanwhile, as a monitor's worker does.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


class GraphedStep:
    """Repeats a step from one capture of it.

    Parameters
    ----------
    advance : function of tensors
        Makes a step from its inputs on the device, changes `state` in place and returns the losses. It is
        called once, or a few times, with the same places of all tensors that it will see in every replay.
    inputs : function of a step and a number of steps
        The inputs of so many steps from there on, tensors on the device with a leading axis of steps, otherwise
        of the same shapes and dtypes always.
    state : sequence of Tensor
        All that `advance` changes.
    device : torch.device
    capture : Capture
        `capture_cuda_graph`, or a stand-in for a test without a GPU.
    """

    def __init__(
        self,
        advance: Callable[[Sequence[Tensor]], Tensor],
        inputs: Callable[[int, int], Sequence[Tensor]],
        state: Sequence[Tensor],
        device: torch.device,
        capture: Capture = capture_cuda_graph,
    ) -> None:
        self._advance, self._inputs = advance, inputs
        self._state, self._capture = state, capture
        self._buffers: list[Tensor] = []
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._first = self._next = -WINDOW
        self._launch: Launch | None = None
        self._losses = torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """Make step number `step` (from 0) and return its losses."""
        if step != self._next or step >= self._first + WINDOW:
            self._prepare(step)
        if self._launch is None:
            self._launch, self._losses = self._capture(self._body, [*self._state, self._place])
        self._launch()
        self._next = step + 1
        return self._losses.clone()

    def _body(self) -> Tensor:
        losses = self._advance([buffer.index_select(0, self._place).squeeze(0) for buffer in self._buffers])
        self._place.add_(1)
        return losses

    def _prepare(self, first: int) -> None:
        """Put the inputs of the steps from `first` on where the graph reads them, behind what is in flight."""
        inputs = self._inputs(first, WINDOW)
        if not self._buffers:
            self._buffers = [torch.empty_like(tensor) for tensor in inputs]
        for buffer, tensor in zip(self._buffers, inputs, strict=True):
            buffer.copy_(tensor)
        self._place.zero_()
        self._first = first
