"""One training step: the stacked trainer against a plain `nn.Module` loop, paired in one process.

``python -m bench.training`` times, for the `paper` model, one step of

- `plain`: `torch.nn.TransformerEncoderLayer` under `torch.nn.Embedding`, `torch.optim.AdamW` as it comes,
  `cross_entropy`, a batch drawn by an index: the loop most people would write;
- `fastent`: `fastent.train.stack.Stack`, data order included, for 1 seed and for 8.

The rows say how many seeds a step covers; ratios are of the time per seed, round by round. The acceptance: 1 seed
on 2 threads at most a third of `plain`, and 8 seeds no slower per seed than 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.harness import environment, interleaved, quantiles, ratio, write_rows
from fastent.train.plain import plain_model
from fastent.train.presets import TrainConfig, preset
from fastent.train.stack import Stack
from fastent.train.tasks import make_task, split

VARIANTS: dict[str, dict[str, object]] = {
    "paper": {},
    "paper, mean readout": {"readout": "mean"},
    "paper, with =": {"equals_token": True},
    "MLP": {"model": "mlp"},
}


def plain_step(config: TrainConfig, seed: int) -> Callable[[], object]:
    """Return one step of the loop most people would write."""
    torch.manual_seed(seed)
    task = make_task(config)
    train = split(task, config.train_fraction, seed)[0]
    inputs, labels = task.inputs[train], task.labels[train]
    model = plain_model(config, task)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=config.betas
    )

    def step() -> None:
        batch = torch.randint(len(train), (config.batch_size,))
        loss = torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    """Time every variant, print the ratios, write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/training.jsonl"))
    arguments = parser.parse_args()
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name in arguments.variants:
            config = replace(preset("paper"), **VARIANTS[name])  # type: ignore[arg-type]
            calls = {
                "plain": plain_step(config, 1000),
                "fastent": Stack(config, [1000]).train_step,
                "fastent x8": Stack(config, range(1000, 1008)).train_step,
            }
            seconds = interleaved(calls, rounds=arguments.rounds)
            seconds["fastent x8"] = seconds["fastent x8"] / 8
            for provider, values in seconds.items():
                rows.append(
                    {
                        "op": "training step, per seed",
                        "model": name,
                        "provider": provider.split()[0],
                        "seeds": 8 if provider.endswith("x8") else 1,
                        **quantiles(values),
                        **environment(),
                    }
                )
            one = ratio(seconds["plain"], seconds["fastent"])
            eight = ratio(seconds["fastent x8"], seconds["fastent"])
            print(
                f"{name:20s} {threads} threads: {one[0]:.1f} times faster than plain "
                f"({one[1]:.1f} to {one[2]:.1f}); 8 seeds take {eight[0]:.2f} ({eight[1]:.2f} to {eight[2]:.2f}) "
                f"of 1 seed's time per seed; {1e3 * sorted(seconds['fastent'])[len(seconds['fastent']) // 2]:.2f} ms"
            )
    write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
