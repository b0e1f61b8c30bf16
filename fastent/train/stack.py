"""Several seeds of one configuration in training: parameters, AdamW, one step, evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastent.train.models import initial_parameters
from fastent.train.plain import plain_model
from fastent.train.presets import TrainConfig
from fastent.train.tasks import batch_index, make_task, probe_index, split


class Stack:
    """Seeds of one configuration, trained side by side and independent of each other.

    Parameters
    ----------
    config : TrainConfig
        What to train.
    seeds : sequence of int
        Each seed decides its split, starting values, batches and probes alone.
    device : str or torch.device
        Where to train.
    dtype : torch.dtype
        float32, or float64 for tests.

    Attributes
    ----------
    steps_done : int
        Steps that every seed has made.
    seeds : tuple of int
        The seeds still in training, in the order of every result's leading axis.
    """

    def __init__(
        self,
        config: TrainConfig,
        seeds: Sequence[int],
        device: str | torch.device = "cpu",
        condition: object | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.task = make_task(config)
        self.seeds = tuple(seeds)
        self.steps_done = 0
        self._models = {}
        self._optimizers = {}
        self._split = {}
        for seed in self.seeds:
            model = plain_model(config, self.task).to(device, dtype)
            model.load_state_dict(initial_parameters(config, self.task, seed))
            self._models[seed] = model
            self._optimizers[seed] = torch.optim.AdamW(
                model.parameters(),
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                betas=config.betas,
            )
            self._split[seed] = split(self.task, config.train_fraction, seed)

    def train_step(self) -> Tensor:
        """Make one step of every seed and return its training losses, (S,), detached."""
        losses = []
        for seed in self.seeds:
            train = self._split[seed][0]
            pairs = train[
                torch.from_numpy(batch_index(seed, self.steps_done, len(train), self.config.batch_size))
            ]
            loss = cross_entropy(self._models[seed](self.task.inputs[pairs]), self.task.labels[pairs])
            self._optimizers[seed].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizers[seed].step()
            losses.append(loss.detach())
        self.steps_done += 1
        return torch.stack(losses)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Tensor]:
        """Return train and test loss and accuracy, and parameter_norm, each (S,), float64."""
        rows: dict[str, list[Tensor]] = {}
        for seed in self.seeds:
            model = self._models[seed]
            for name, index in zip(("train", "test"), self._split[seed], strict=True):
                logits, labels = model(self.task.inputs[index]), self.task.labels[index]
                rows.setdefault(f"{name}_loss", []).append(cross_entropy(logits, labels).double())
                rows.setdefault(f"{name}_accuracy", []).append((logits.argmax(1) == labels).double().mean())
            squares = sum((p.double() ** 2).sum() for p in model.parameters())
            rows.setdefault("parameter_norm", []).append(torch.as_tensor(squares).sqrt())
        return {name: torch.stack(values) for name, values in rows.items()}

    @torch.no_grad()
    def representations(self, which: str = "probe") -> Tensor:
        """Return what the head reads, (S, N, d), on a probe of training ("probe") or "test" pairs.

        The pairs of a seed stay the same for the whole run.
        """
        place = {"probe": 0, "test": 1}[which]
        return torch.stack(
            [
                self._models[seed].represent(
                    self.task.inputs[
                        probe_index(self._split[seed][place], self.config.probe_size, seed, which)
                    ]
                )
                for seed in self.seeds
            ]
        )

    def state_dict(self, seed: int) -> dict[str, Tensor]:
        """Return a seed's whole training state as flat named tensors (copies), steps included."""
        state = {f"parameter.{k}": v.clone() for k, v in self._models[seed].state_dict().items()}
        moments = self._optimizers[seed].state
        for name, parameter in self._models[seed].named_parameters():
            if parameter in moments:
                state[f"first.{name}"] = moments[parameter]["exp_avg"].clone()
                state[f"second.{name}"] = moments[parameter]["exp_avg_sq"].clone()
            else:
                state[f"first.{name}"] = torch.zeros_like(parameter)
                state[f"second.{name}"] = torch.zeros_like(parameter)
        return state | {"steps": torch.tensor(self.steps_done)}

    def load_state_dict(self, seed: int, state: dict[str, Tensor]) -> None:
        """Put a seed's state back; load all seeds of a stack from the same step.

        Raises
        ------
        KeyError
            If the seed is not of this stack, or a tensor is missing.
        """
        model = self._models[seed]
        model.load_state_dict({name: state[f"parameter.{name}"] for name in model.state_dict()})
        for name, parameter in model.named_parameters():
            self._optimizers[seed].state[parameter] = {
                "step": state["steps"].float(),
                "exp_avg": state[f"first.{name}"].clone(),
                "exp_avg_sq": state[f"second.{name}"].clone(),
            }
        self.steps_done = int(state["steps"])

    def keep(self, seeds: Sequence[int]) -> None:
        """Drop every other seed; the ones kept go on unchanged."""
        self.seeds = tuple(seed for seed in self.seeds if seed in set(seeds))
