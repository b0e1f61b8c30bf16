"""The paper's five-step protocol (Appendix D.1) on a user's own model, from the first record to early stopping."""

import math

import pytest
import torch
from torch import nn

import fastent
from fastent.forecast.diagnosis import Phase
from fastent.forecast.predict import Reason

EVERY = 10


class Collapsing(nn.Module):
    """A user's model whose layer loses directions as training goes on: all but one shrink by `rate` a step."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.encoder = nn.Linear(6, 6, bias=False, dtype=torch.float64)
        nn.init.eye_(self.encoder.weight)
        self.head = nn.Linear(6, 2, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))

    def train_step(self) -> None:
        with torch.no_grad():
            self.encoder.weight[1:] *= 1 - self.rate


def run(
    rate: float, steps: int, probe: torch.Tensor, **options
) -> tuple[fastent.SpectralEntropyMonitor, int]:
    """Train under a monitor; the test accuracy is 1 from the step where the entropy is first below 0.3."""
    model = Collapsing(rate)
    monitor = fastent.SpectralEntropyMonitor(model, probe, layers="encoder", every=EVERY, **options)
    for step in range(steps):
        monitor.step(step)
        if monitor.should_stop():
            break
        model.train_step()
    grok = next((record.step for record in monitor.history if record.normalized < 0.3), None)
    return monitor, grok


def test_the_five_steps_calibrate_forecast_stop_and_diagnose():
    probe = torch.randn(256, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # 1 and 2: instrument a few runs to completion, fit H* and the law
    pilots = [run(rate, 1_000, probe) for rate in (0.002, 0.0025, 0.003, 0.0035)]
    histories = [fastent.History.from_records(monitor.history, t_grok=grok) for monitor, grok in pilots]
    h_star = fastent.calibrate_threshold(histories).value
    assert abs(h_star - 0.3) < 0.02
    law = fastent.PowerLaw.fit(histories)

    # 3: a new run, forecast while it is above H*
    monitor, _ = run(0.0028, 300, probe, law=law)
    forecast = monitor.predict_grok_time()
    _, truth = run(0.0028, 1_000, probe)
    assert forecast.reason is None
    assert abs(forecast.step - truth) < 0.25 * truth
    assert forecast.interval is None
    assert "takes at least 9 runs that grokked; the law has 4" in forecast.note
    assert monitor.diagnose().phase is Phase.COLLAPSE_ONSET

    # 4: stop a set time after the crossing, long before the budget
    stopping = fastent.StopAfterCrossing(50)
    monitor, _ = run(0.0028, 10_000, probe, law=law, stopping=stopping)
    (crossed,) = monitor.crossings.values()
    assert monitor.last_step == crossed + 50
    assert monitor.predict_grok_time().reason is Reason.BELOW_THRESHOLD

    # 5: a collapse without generalisation is named, and so is a run that never collapses
    long, _ = run(0.0028, 3_000, probe, law=law)
    assert long.diagnose(test_accuracy=0.02).phase is Phase.COLLAPSED_WITHOUT_GENERALISING
    flat, _ = run(0.0, 300, probe, law=law)
    history = fastent.History.from_records(flat.history)
    assert fastent.diagnose(history, threshold=h_star, patience=200).phase is Phase.NO_COLLAPSE


def test_a_monitor_without_a_law_forecasts_nothing_and_says_so():
    monitor = fastent.SpectralEntropyMonitor()
    assert monitor.predict_grok_time().reason is Reason.NO_LAW
    law = fastent.PowerLaw(c1=1000.0, gamma=1.0, c2=0.0, h_star=0.5)
    monitor = fastent.SpectralEntropyMonitor(law=law)
    assert monitor.predict_grok_time().reason is Reason.NO_HISTORY
    h = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    monitor.observe(0, h, layer="a")
    (record,) = monitor.flush()
    assert math.isclose(monitor.predict_grok_time().step, 1000.0 * (record.normalized - 0.5))


def test_several_layers_must_be_named():
    monitor = fastent.SpectralEntropyMonitor(threshold=0.5)
    for layer in ("a", "b"):
        monitor.observe(0, torch.randn(64, 4), layer=layer)
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        monitor.diagnose()
    with pytest.raises(ValueError, match="'c' has no record"):
        monitor.predict_grok_time(layer="c")
    assert monitor.diagnose(layer="a").phase is Phase.NOT_ENOUGH_HISTORY
