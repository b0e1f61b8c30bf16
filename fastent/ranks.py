"""What several ranks hold together: activations under tensor parallelism, and decisions.

Where torch says how the parts fit together (a DTensor) they are gathered; that of a column-parallel layer is taken
before its output is cut to the rank's own part. A plain tensor is whole if every rank holds the same one; if not, it
is a part of which nobody says where it belongs, and it is refused on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Values compared between ranks, and how far they may be apart: kernels that add in any order differ by rounding.
_SAMPLES, _TOLERANCE = 64, 0.02


class Spread:
    """What one pass through a model tells of its parts. Every rank must make the same calls.

    Parameters
    ----------
    model : nn.Module
        The plain module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._groups: dict[str, Any] = {}
        self._outputs: dict[int, Tensor] = {}

    def __enter__(self) -> Spread:
        for module in self._model.modules():
            if any(hasattr(p, "full_tensor") for p in module.parameters(recurse=False)):
                # First of its hooks: the layer's style has not cut the output yet. FSDP has gathered its own shards
                # by then, so that only those of tensor parallelism are left.
                self._handles.append(module.register_forward_hook(self._note, prepend=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def whole(self, name: str, h: Tensor, module: nn.Module | None = None) -> Tensor:
        """Give all of an activation.

        Parameters
        ----------
        name : str
            Of the layer, for the error.
        h : Tensor
            What this rank holds.
        module : nn.Module, optional
            The layer whose output it is.

        Raises
        ------
        ValueError
            On every rank, if they hold different parts that nobody can put together.
        """
        if hasattr(h, "full_tensor"):
            return h.full_tensor()  # type: ignore[no-any-return]
        if hasattr(h, "trigger_wait"):  # of a collective that is under way
            h = h.trigger_wait()
        before = self._outputs.pop(id(module), None)
        if before is not None and isinstance(h, Tensor) and before.shape != h.shape:
            return before.full_tensor()  # type: ignore[attr-defined, no-any-return]
        for group in self._groups.values():
            if not _is_the_same(h, group):
                raise ValueError(
                    f"layer {name!r} holds another part of its activations on each rank (tensor parallelism), here of "
                    f"shape {tuple(h.shape)}, and nobody says how they fit together: watch a layer that gives the "
                    "whole, such as the row-parallel one behind it, let the column-parallel layer before it keep "
                    "DTensors (use_local_output=False), or pass a function as layers that gathers them"
                )
        return h

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        for p in module.parameters(recurse=False):
            mesh = getattr(p, "device_mesh", None)
            for group in [] if mesh is None else mesh.get_all_groups():
                if dist.get_world_size(group) > 1:
                    self._groups.setdefault(group.group_name, group)
        if hasattr(output, "full_tensor"):
            self._outputs[id(module)] = output


def _is_the_same(h: Tensor, group: Any) -> bool:
    """Whether all ranks of `group` hold the same values, as far as some of them tell."""
    flat = h.detach().reshape(-1)
    where = torch.linspace(0, max(len(flat) - 1, 0), _SAMPLES, dtype=torch.float64, device="cpu")
    where = where.long().to(h.device)
    seen = torch.zeros(_SAMPLES + 1, dtype=torch.float64, device=h.device)
    seen[0] = len(flat)
    if len(flat):
        seen[1:] = flat[where].to(torch.float64).nan_to_num()
    all_seen = [torch.empty_like(seen) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_seen, seen, group=group)
    values = torch.stack(all_seen)
    counts, samples = values[:, 0], values[:, 1:]
    apart = (samples - samples[0]).abs().max()
    return bool((counts == counts[0]).all() & (apart <= _TOLERANCE * samples.square().mean().sqrt()))


def any_rank(answer: bool) -> bool:
    """Whether any rank of the default process group answers yes, on every rank; a collective call."""
    votes = torch.tensor(int(answer), dtype=torch.int64, device=device_of_group(None))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def device_of_group(group: dist.ProcessGroup | None) -> torch.device:
    """Device that the tensors of a group's collective calls must be on."""
    nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
