"""The metric of torchmetrics against `fastent.spectral_entropy` of all rows, and what torchmetrics' tester checks."""

import copy
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchmetrics")
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.utilities.exceptions import TorchMetricsUserError

import fastent
from fastent.integrations.torchmetrics import SpectralEntropy

D = 6


def rows(n: int = 90, seed: int = 0) -> Tensor:
    """A decaying spectrum with an offset of some standard deviations."""
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(0, -3, D) + 10.0


def expected(h: Tensor) -> float:
    return fastent.spectral_entropy(h).normalized


def filled(*parts: Tensor, **options: Any) -> SpectralEntropy:
    metric = SpectralEntropy(D, **options)
    for part in parts:
        metric.update(part)
    return metric


def close(value: Tensor, h: Tensor) -> bool:
    return value.dtype == torch.float64 and value.shape == () and abs(value.item() - expected(h)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_entropy_is_that_of_all_rows_at_once_however_they_are_split_and_ordered(
    dtype: torch.dtype,
) -> None:
    h = rows().to(dtype)
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(1))
    for parts in (h.split(90), h.split(17), h.split(1), h[order].split(17), h.tensor_split([0, 5, 5, 80])):
        assert close(filled(*parts).compute(), h)


def test_forward_gives_the_entropy_of_its_batch_and_leaves_the_state_of_update_to_the_bit() -> None:
    metric = SpectralEntropy(D)
    for part in rows().split(25):
        assert close(metric(part), part)
    assert torch.equal(metric.moments, filled(*rows().split(25)).moments)
    assert close(metric.compute(), rows())


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float16),
    "to": lambda m: m.to(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("inside", [False, True])
def test_a_cast_of_the_metric_or_of_the_module_that_holds_it_changes_no_bit(cast: str, inside: bool) -> None:
    metric, h = filled(rows()[:40]), rows()
    before, value = metric.moments.clone(), metric.compute()
    CASTS[cast](nn.ModuleList([nn.Linear(2, 2), metric]) if inside else metric)
    assert torch.equal(metric.moments, before)
    assert metric.compute().dtype == torch.float64
    assert torch.equal(metric.compute(), value)
    metric.update(h[40:])
    assert close(metric.compute(), h)
    metric.reset()
    metric.update(h)
    assert close(metric.compute(), h)


def test_set_dtype_changes_no_bit() -> None:
    metric = filled(rows())
    assert metric.set_dtype(torch.float16) is metric
    assert close(metric.compute(), rows())


@pytest.mark.parametrize(
    "copied", [lambda m: m.clone(), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_copy_has_the_rows_and_goes_on_by_itself(copied: Callable[[Any], Any]) -> None:
    h = rows()
    metric = filled(h[:50])
    other = copied(metric)
    assert type(other) is SpectralEntropy
    other.update(h[50:])
    assert close(other.compute(), h)
    assert close(metric.compute(), h[:50])


def test_a_reset_forgets_all_rows() -> None:
    metric = filled(rows(seed=1))
    metric.compute()
    metric.reset()
    assert not metric.moments.any()
    metric.update(rows())
    assert close(metric.compute(), rows())


def test_the_state_is_in_the_state_dict_when_it_is_persistent_and_loads_as_plain_tensors(
    tmp_path: Any,
) -> None:
    metric = filled(rows()[:50])
    assert metric.state_dict() == {}
    metric.persistent(True)
    torch.save(metric.state_dict(), tmp_path / "metric.pt")
    other = SpectralEntropy(D)
    other.load_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
    other.update(rows()[50:])
    assert close(other.compute(), rows())


@pytest.mark.parametrize("h", [rows(0), rows(1), torch.full((5, D), math.nan)])
def test_fewer_than_two_rows_and_nan_have_the_entropy_nan(h: Tensor) -> None:
    metric = filled(h)
    assert math.isnan(metric.compute())
    assert math.isnan(metric(h))
    assert metric.moments.shape == SpectralEntropy(D).moments.shape


def test_before_the_first_update_the_entropy_is_nan_and_torchmetrics_says_so() -> None:
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert math.isnan(SpectralEntropy(D).compute())


def test_the_gradient_is_left_out_without_a_word() -> None:
    h = rows().requires_grad_()
    metric = SpectralEntropy(D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not metric(h).requires_grad
    assert not metric.moments.requires_grad
    assert close(metric.compute(), h.detach())


def test_tokens_and_mask_choose_the_rows() -> None:
    h, mask = rows(60).reshape(20, 3, D), torch.ones(20, 3)
    mask[:7, 2] = 0
    metric = SpectralEntropy(D, tokens="flatten")
    metric.update(h[:10], mask=mask[:10])
    metric.update(h[10:], mask=mask[10:])
    assert close(metric.compute(), h[mask.bool()])


def test_metrics_in_a_collection_keep_their_own_rows() -> None:
    h = rows(60).reshape(20, 3, D)
    several = {"first": SpectralEntropy(D, tokens="first"), "last": SpectralEntropy(D, tokens="last")}
    collection = MetricCollection({**several, "loss": MeanMetric()})
    for part in h.split(8):
        collection.update(h=part, value=torch.tensor(2.0))
    values = collection.compute()
    assert close(values["first"], h[:, 0])
    assert close(values["last"], h[:, 2])
    assert values["loss"] == 2.0
    assert close(collection(h=h, value=torch.tensor(3.0))["last"], h[:, 2])


@pytest.mark.parametrize("state", [lambda m: m, lambda m: m.metric_state])
def test_merged_states_are_the_rows_of_both_after_a_value_was_asked_for_too(
    state: Callable[[Any], Any],
) -> None:
    h = rows()
    metric, other = filled(h[:50]), filled(h[50:])
    metric.compute()
    metric.merge_state(state(other))
    assert close(metric.compute(), h)
    assert close(other.compute(), h[50:])


def test_a_synchronised_value_is_of_the_rows_of_all_ranks_in_their_order_and_the_state_stays_the_ranks_own() -> (
    None
):
    h = rows()
    parts = [filled(), filled(h[:50]), filled(h[50:51]), filled(h[51:])]  # the first rank has no row

    def gather(x: Tensor, group: Any) -> list[Tensor]:
        return [part.moments for part in parts]

    options = {"dist_sync_fn": gather, "distributed_available_fn": lambda: True}
    metric = filled(h[50:51], **options)
    assert close(metric.compute(), h)
    assert torch.equal(metric.moments, parts[2].moments)
    with metric.sync_context(dist_sync_fn=gather), pytest.raises(TorchMetricsUserError):
        metric(h)
    each = filled(h[50:51], dist_sync_on_step=True, **options)
    assert close(each(h[50:51]), h)


def test_what_torchmetrics_fixes_is_fixed() -> None:
    metric = filled(rows())
    for name in ("is_differentiable", "higher_is_better"):
        with pytest.raises(RuntimeError, match="Can't change const"):
            setattr(metric, name, True)
    assert hash(metric) != hash(metric.clone())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")  # torch's own
        warnings.filterwarnings("ignore", "This property will be removed")  # torchmetrics' own
        torch.jit.script(metric)


def test_a_plot_spans_zero_to_one() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = filled(rows()).plot()
    assert axes.get_ylim()[0] <= 0.0 < 1.0 <= axes.get_ylim()[1]
    pyplot.close(figure)


def test_another_width_or_device_is_refused_and_the_state_stays() -> None:
    metric = filled(rows())
    before = metric.moments.clone()
    with pytest.raises(ValueError, match=r"num_features = 6; got activations of d = 3"):
        metric.update(torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="different devices in metric calculation"):
        metric.update(torch.empty(5, D, device="meta"))
    assert torch.equal(metric.moments, before)
    with pytest.raises(ValueError, match="num_features must be at least 2; got 1"):
        SpectralEntropy(1)


TWO = """
import sys, torch, torch.distributed as dist, fastent
from fastent.integrations.torchmetrics import SpectralEntropy
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
h = torch.randn(90, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 10.0
for shards in ((h[:33], h[33:]), (h[:0], h), (h[:1], h[1:])):
    metric = SpectralEntropy(6).bfloat16()
    for part in shards[rank].split(20):
        metric.update(part)
    print(metric.compute().item(), fastent.spectral_entropy(h).normalized, int(metric.moments.view(torch.float64)[0]))
dist.destroy_process_group()
"""


@pytest.mark.nightly
def test_two_processes_give_the_entropy_of_all_rows_on_both(tmp_path: Any) -> None:
    command = [sys.executable, "-c", TWO]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    printed = [[line.split() for line in rank.communicate(timeout=300)[0].splitlines()] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [[n for _, _, n in lines] for lines in printed] == [["33", "0", "1"], ["57", "90", "89"]]
    assert [value for value, _, _ in printed[0]] == [value for value, _, _ in printed[1]]
    assert all(abs(float(value) - float(whole)) < 1e-13 for value, whole, _ in printed[0])
