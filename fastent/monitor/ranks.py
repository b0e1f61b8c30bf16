"""The rows of every rank as one: moments of a monitor's layers, added up in one sum over the ranks.

Every rank takes part in every evaluation, with rows or without, with NaN in them or an error of its own: otherwise the
others would wait for it. What they have to agree on beforehand, the names and widths of the layers, they know from the
evaluation before; where a rank has something else to say, such as at the first evaluation or after an error, it says
so in the sum, and all of them exchange the rest and add up again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.distributed as dist

from fastent.moments import Moments, add_up
from fastent.monitor.deferred import described
from fastent.process import interrupts_held


def count_ranks() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


_NONFINITE = 2.0


class Gathered(NamedTuple):
    """Rows of a layer: their moments, the features, the name of their mask, and whether the layer ran at all."""

    moments: Moments
    d: int
    mask: str | None = None
    ran: bool = True
    nonfinite_on: tuple[int, ...] = ()
    """Ranks whose rows hold NaN or Inf, of those that were added up."""

    @property
    def note(self) -> float:
        """What the other ranks are told: whether it ran, and with finite numbers."""
        if self.ran and self.moments.n and not bool(self.moments.mean.isfinite().all()):
            return _NONFINITE
        return float(self.ran)


class Ranks:
    """What the ranks of the default process group know of each other. Every rank must make the same calls."""

    def __init__(self) -> None:
        self._agreed: dict[str, tuple[int, str | None]] = {}  # width and mask of each layer

    def add_up(
        self, step: int, own: Mapping[str, Gathered], error: Exception | None = None
    ) -> dict[str, Gathered]:
        """Add up the rows of all ranks, by layer; the same on every rank, with all layers that ever ran on any.

        Parameters
        ----------
        step : int
            Of the evaluation.
        own : dict
            What this rank has, also of layers that ran at another time. Its moments are not changed.
        error : Exception, optional
            Why it has nothing.

        Raises
        ------
        Exception
            `error` itself.
        ValueError
            On every rank, if they are at different steps, or a layer has another width on one of them.
        RuntimeError
            On the other ranks, if one had an error; or if ranks did not come, with their numbers.
        """
        with interrupts_held() as interrupts, interrupts.second_at_once():  # others may be late
            knows = all(self._agreed.get(layer, (None,))[0] == rows.d for layer, rows in own.items())
            total, known_to_all = self._sum(step, own, knows and error is None)
            if not known_to_all:
                self._exchange(step, own, error)
                total, _ = self._sum(step, own, True)
        return total

    def _sum(self, step: int, own: Mapping[str, Gathered], knows: bool) -> tuple[dict[str, Gathered], bool]:
        """Add up the layers that were agreed on; whether every rank `knows` its own to be among them."""
        nothing = Gathered(Moments(), 0, ran=False)
        mine = [own.get(layer, nothing) for layer in self._agreed]
        widths = [d for d, _ in self._agreed.values()]
        parts = [
            Moments().merge(rows.moments) if rows.d == d else Moments()
            for rows, d in zip(mine, widths, strict=True)
        ]
        notes = [float(step), float(knows), *(rows.note for rows in mine)]
        told = add_up(parts, widths, notes=notes) if count_ranks() > 1 else [notes]
        steps = [int(note[0]) for note in told]
        if len(set(steps)) > 1:
            raise ValueError(
                f"with across_ranks every rank evaluates at the same steps; they are at {steps}, in the order of their "
                "numbers: call step with the same counts on all"
            )
        total = {}
        for i, ((layer, (d, mask)), part) in enumerate(zip(self._agreed.items(), parts, strict=True), 2):
            nonfinite = tuple(rank for rank, note in enumerate(told) if note[i] == _NONFINITE)
            total[layer] = Gathered(part, d, mask, any(note[i] for note in told), nonfinite)
        return total, all(note[1] for note in told)

    def _exchange(self, step: int, own: Mapping[str, Gathered], error: Exception | None) -> None:
        """Agree on the layers of all ranks, in the order of the ranks; or raise what went wrong on one of them."""
        mine = (
            None if error is None else described(error),
            {layer: (rows.d, rows.mask) for layer, rows in own.items()},
        )
        told: list[Any] = [mine] * count_ranks()
        if count_ranks() > 1:
            dist.all_gather_object(told, mine)
        failures = [f"on rank {rank}: {text}" for rank, (text, _) in enumerate(told) if text is not None]
        if error is not None:
            raise error
        if failures:
            raise RuntimeError(f"the evaluation of step {step} failed {'; '.join(failures)}")
        agreed = dict(self._agreed)
        for rank, (_, layers) in enumerate(told):
            for layer, (d, mask) in layers.items():
                before, mask_before = agreed.get(layer, (d, None))
                if before != d:
                    raise ValueError(
                        f"layer {layer!r} has d = {d} on rank {rank}, and d = {before} on others or before: rows of "
                        "different widths do not add up"
                    )
                agreed[layer] = d, mask_before or mask
        self._agreed = agreed

    def __getstate__(self) -> dict[str, Any]:
        return {"_agreed": {}}  # a copy may be made on some of the ranks
