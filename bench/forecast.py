"""Time of the forecast: ``python -m bench.forecast [--quick] [--out FILE]``.

Fitting the power law to the histories of ten runs, once per experiment; a prediction, once per evaluation; and the
sampling error of H, which an evaluation with ``standard_error=True`` takes besides.
"""

from __future__ import annotations

import math

import torch

import fastent
from bench.harness import Row, command, environment, interleaved, quantiles
from bench.tables import simple_table

RUNS = 10
EVALUATIONS = 70


def histories() -> list[fastent.History]:
    """Make runs whose entropy falls along a curve, each at its own pace, with a little noise."""
    g = torch.Generator().manual_seed(0)
    runs = []
    for _ in range(RUNS):
        t_grok = 12_000 + 200 * int(torch.randint(10, (), generator=g))
        steps = list(range(0, t_grok + 1, 200))
        noise = (0.003 * torch.randn(len(steps), generator=g)).tolist()
        curve = [
            0.61 + 0.3 * math.sqrt(max(0.0, 1 - t / t_grok)) + e for t, e in zip(steps, noise, strict=True)
        ]
        runs.append(fastent.History(steps, curve, t_grok=t_grok))
    return runs


def measure(quick: bool) -> list[Row]:
    """Rows at this process's thread count."""
    runs = histories()
    law = fastent.PowerLaw.fit(runs)
    h = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    calls = {
        f"PowerLaw.fit, {RUNS} runs of about {EVALUATIONS} evaluations": lambda: fastent.PowerLaw.fit(runs),
        "predict_grok_time": lambda: fastent.predict_grok_time(0.75, law, step=6000),
        "sampling_error, 512 x 128": lambda: fastent.sampling_error(h),
    }
    seconds = interleaved(calls, rounds=9 if quick else 25, budget=10.0 if quick else 30.0)
    return [
        {
            "op": "forecast",
            "provider": name,
            **quantiles(values),
            "rounds": len(values),
            **environment("scipy"),
        }
        for name, values in seconds.items()
    ]


if __name__ == "__main__":
    command("bench.forecast", __doc__, measure, simple_table, threads=(1,))
