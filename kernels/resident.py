"""Resident evaluation: the same one again and again, into memory taken once.

What a training loop runs: it allocates nothing, touches no tensor on the host, asks the device for nothing, and so can
be captured in a CUDA graph after one call outside (which compiles). Launches of an evaluation, participation ratio
included: 1 on the covariance side, 2 on the Gram side and wherever else the means come first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .covariance import LAUNCHES
from .launch import Launch, Output, Side, output, workspace


class ResidentCovariance:
    """Centred covariance (or Gram matrix), mean and participation ratio of matrices of one shape.

    Parameters
    ----------
    n, d : int
        Samples and features.
    batch : int
        Matrices of one evaluation.
    device : torch.device
        Where they are: CUDA of compute capability 8.0 or later, or the CPU under Triton's interpreter.
    side : {"covariance", "gram"}, optional
        The smaller one by default.
    scale : float, optional
        Factor of the sums of products; 1 / n by default.

    Notes
    -----
    The scratch memory is one: an evaluation must not start, on whatever stream, before the last one of the same
    object has ended. Evaluations on one stream keep to that by themselves.
    """

    def __init__(
        self,
        n: int,
        d: int,
        *,
        batch: int = 1,
        device: torch.device,
        side: Side | None = None,
        scale: float | None = None,
    ) -> None:
        self.n, self.d, self.batch, self.device = n, d, batch, device
        self.side: Side = side or ("gram" if n < d else "covariance")
        self.scale = 1.0 / n if scale is None else scale
        self.workspace = workspace(self.side, batch, n, d, device, spread=True)

    def output(self) -> Output:
        """Take memory for one result; a ring holds several."""
        return output(self.side, self.batch, self.n, self.d, self.device, spread=True)

    def launches(self, h: Tensor, out: Output) -> list[Launch]:
        """Return what `__call__` runs, in order."""
        return LAUNCHES[self.side](h, out, self.workspace, self.scale)

    def __call__(self, h: Tensor, out: Output) -> None:
        """Queue the evaluation of `h` into `out` on the current stream and return.

        Parameters
        ----------
        h : Tensor, shape (batch, n, d), or (n, d) for a batch of one
            float16, bfloat16, float32 or float64, any strides, on the device given here.
        out : Output
            From `output`; `lower`, `centre` and `spread` are overwritten.
        """
        # Triton launches on the current device.
        with torch.cuda.device_of(h):  # type: ignore[no-untyped-call]
            for launch in self.launches(h, out):
                launch.run()
