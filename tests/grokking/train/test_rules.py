"""Rules that are checked before the first job: quick, without a file or an allocation of the sizes asked for."""

import dataclasses
import json
import tracemalloc

import pytest
import torch
from toy_stack import JOB

from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.models import parameter_shapes
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.sweep import check_config, check_device, check_jobs, check_seeds, memory
from fastent.grokking.train.tasks import make_task


def test_the_cpu_is_always_there_and_a_gpu_where_torch_sees_it(monkeypatch):
    check_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda")
    check_device("cuda:1")
    with pytest.raises(ValueError, match="got 'cuda:2', and torch sees 2 CUDA devices here"):
        check_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="got 'cuda', and torch sees no CUDA device here"):
        check_device("cuda")


@pytest.mark.parametrize(
    "changes",
    [
        {"modulus": 10**9}, {"modulus": 10**9, "task": "mul_nonzero"}, {"width": 10**9}, {"feedforward": 10**12},
        {"batch_size": 10**12}, {"heads": 10**6, "width": 10**6}, {"model": "mlp", "hidden": (10**6, 10**6)},
    ],
)  # fmt: skip
def test_sizes_beyond_this_machine_are_refused_before_anything_is_allocated(changes):
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=r"a seed of these settings needs some \S+ GB, and this machine has"
        ):
            check_config(dataclasses.replace(TrainConfig(), **changes))
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "changes",
    [{}, {"model": "mlp"}, {"model": "mlp", "combine": "sum"}, {"separate_tokens": True}, {"task": "s5"}],
)
def test_the_estimate_of_memory_counts_every_parameter_and_pair_and_is_no_alarm(changes):
    config = dataclasses.replace(TrainConfig(), **changes)
    task = make_task(config)
    parameters = sum(torch.Size(shape).numel() for shape in parameter_shapes(config, task).values())
    least = 24 * parameters + 8 * task.inputs.numel() + 8 * len(task.labels)
    assert 0.95 * least < memory(config) < 1e9
    stack = Stack(config, [0])
    held = sum(t.nbytes for tensors in stack._groups[0].state.values() for t in tensors.values())
    assert memory(config) > held


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start": "kaiming"}, "start must be torch, normal or xavier; got 'kaiming'"),
        ({"sampling": "random"}, "sampling must be epochs or replacement; got 'random'"),
        ({"final_norm": True, "entropy_at": "head"}, "entropy_at must be readout or final_norm; got 'head'"),
        ({"norm_place": "Pre"}, "norm_place must be post, pre or none; got 'Pre'"),
        ({"measures": ("fourier", "logits")}, "measures must be .*, progress or logit_scale; got 'logits'"),
    ],
)
def test_a_choice_that_is_not_there_is_refused_by_name_with_those_that_are(changes, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**changes)


def test_both_sets_of_pairs_need_the_rows_of_an_entropy():
    small = dataclasses.replace(TrainConfig(), modulus=5)
    check_config(dataclasses.replace(small, train_fraction=0.08))
    for fraction, said in ((0.04, "1 of 25 pairs to the train set"), (0.96, "1 of 25 pairs to the test set")):
        with pytest.raises(ValueError, match=f"leaves {said}, and an entropy needs 2"):
            check_config(dataclasses.replace(small, train_fraction=fraction))


def test_seeds_are_counted_before_they_are_listed():
    check_seeds(10_000, 2**64 - 1)
    with pytest.raises(
        ValueError, match="at most 10,000 at a time, for each is a run and a folder; got 10,001"
    ):
        check_seeds(10_001, 0)
    with pytest.raises(ValueError, match=r"below 2\^64; got 18446744073709551616"):
        check_seeds(1, 2**64)


def test_runs_of_one_name_are_of_one_configuration(toy, tmp_path):
    out = tmp_path / "out"
    toy(out, dataclasses.replace(JOB, seeds=(5,)))
    more = dataclasses.replace(JOB, seeds=(6, 7))
    check_jobs([more], out, workers=1, device="cpu")
    measured = dataclasses.replace(more, config=dataclasses.replace(JOB.config, measures=("test_probe",)))
    check_jobs([measured], out, workers=1, device="cpu")
    other = dataclasses.replace(more, config=dataclasses.replace(JOB.config, weight_decay=0.5))
    with pytest.raises(ValueError, match=r"seed5 with other settings \(weight_decay 1.0, now 0.5\), and"):
        check_jobs([other], out, workers=1, device="cpu")
    check_jobs([other], out, workers=1, device="cpu", force=True)
    check_jobs([dataclasses.replace(other, condition="to-the-end")], out, workers=1, device="cpu")
    # The run that is asked for again is told by its own folder, and one that came to nothing counts as none.
    check_jobs([dataclasses.replace(other, seeds=(5,))], out, workers=1, device="cpu")
    for path in (out / JOB.run_name(5)).iterdir():
        if path.name != "config.json":
            path.unlink()
    check_jobs([other], out, workers=1, device="cpu")
    assert json.loads((out / JOB.run_name(5) / "config.json").read_text())["seed"] == 5
