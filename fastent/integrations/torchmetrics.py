"""The spectral entropy as a metric of torchmetrics: `fastent.Moments` behind the host's update, compute and sync.

The state is one int64 tensor of fixed shape that holds the bits of `Moments.pack`, float64: nothing that casts a module
to half precision rounds it, every rank has the same shape, one without rows too, and parts add up by `Moments.merge`.
"""

from typing import Any, Self

import torch
from torch import Tensor

from fastent.activations import Positions, Tokens
from fastent.moments import Moments

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    if error.name != "torchmetrics":
        raise
    raise ModuleNotFoundError(
        "fastent.integrations.torchmetrics needs torchmetrics, which is not installed: pip install torchmetrics",
        name="torchmetrics",
    ) from None


class SpectralEntropy(Metric):
    """Normalised spectral entropy of the rows of all updates and, when synchronised, of all processes.

    ``update(h, mask=None)`` takes what `fastent.Moments.update` takes, of any real dtype, without its gradient.
    ``compute()`` gives H, float64, shape (), on the metric's device: that of `fastent.spectral_entropy` of all rows at
    once to rounding, however they were split and ordered; NaN of fewer than two rows, and where one is NaN or Inf.

    Parameters
    ----------
    num_features : int
        Width d of the activations, at least 2: it fixes the state's shape.
    tokens, positions, channel_axis
        Which rows are meant, as in `fastent.spectral_entropy`.
    **kwargs
        Those of every metric, such as ``sync_on_compute``.

    Raises
    ------
    ValueError
        If `num_features` is below 2; by ``update``, if the activations have another width.

    Examples
    --------
    >>> import torch
    >>> metric = SpectralEntropy(num_features=2)
    >>> metric.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    >>> metric.compute()
    tensor(1., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    moments: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        tokens: Tokens | None = None,
        positions: Positions | None = None,
        channel_axis: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_features < 2:
            raise ValueError(
                f"the normalised entropy divides by log d, so num_features must be at least 2; got {num_features}"
            )
        self.num_features = num_features
        self.tokens, self.positions, self.channel_axis = tokens, positions, channel_axis
        size = 3 + 2 * num_features + num_features * (num_features + 1) // 2
        self.add_state("moments", torch.zeros(size, dtype=torch.int64, device="cpu"), dist_reduce_fx=_merged)

    def update(self, h: Tensor, *, mask: Tensor | None = None) -> None:
        """Add rows; `mask` leaves padding out."""
        if h.device != self.moments.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device; h is on {h.device}, the metric on "
                f"{self.moments.device}"
            )
        part = Moments().update(
            h.detach(),
            tokens=self.tokens,
            positions=self.positions,
            channel_axis=self.channel_axis,
            mask=mask,
        )
        if part.n and len(part.mean) != self.num_features:
            raise ValueError(
                f"this metric is of num_features = {self.num_features}; got activations of d = {len(part.mean)}"
            )
        self.moments = _bits(_moments(self.moments).merge(part), like=self.moments)

    def compute(self) -> Tensor:
        """H of the rows so far, shape (), float64."""
        moments = _moments(self.moments)
        h = moments.spectral_entropy().normalized if moments.n > 1 else torch.nan
        return torch.tensor(h, dtype=torch.float64, device=self.moments.device)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the rows of another metric, or of its ``metric_state``."""
        super().merge_state(incoming_state)
        self._computed = None  # the host keeps the value from before (1.9)

    def set_dtype(self, dst_type: str | torch.dtype) -> Self:
        """Itself, as it is: the sums are float64 whatever the model's dtype."""
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)
        self._computed = None  # cast to the dtype of the model by now
        return self

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Figure and axes with one or several values of H; see ``torchmetrics.Metric.plot``."""
        return self._plot(val, ax)


def _merged(parts: Tensor) -> Tensor:
    """State of all rows from the states of several metrics, shape (parts, size)."""
    total = Moments()
    for part in parts:
        total.merge(_moments(part))
    return _bits(total, like=parts[0])


def _moments(bits: Tensor) -> Moments:
    """Moments of a state, on its device, or on the CPU where there is no float64. All zeros is no row."""
    packed = (bits.cpu() if bits.is_mps else bits).view(torch.float64)
    return Moments.unpack(packed) if packed[0] else Moments()


def _bits(moments: Moments, like: Tensor) -> Tensor:
    """State of moments, of the shape and on the device of another state."""
    return moments.pack().view(torch.int64).to(like.device) if moments.n else torch.zeros_like(like)
