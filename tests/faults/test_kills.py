"""Row 1 of the faults: SIGKILL at any operation on files, between any two of them, and at random instants.

What is killed trains a stack, packs runs into a file, or writes a report. Done again, each leaves the bytes of an
uninterrupted one and no other file; until then each file is whole, as it was before or as it becomes. A second kill
meets half of the processes that go on. Seeds are fixed, and so are the operations; instants depend on the machine.
"""

import dataclasses
import functools
import random

import pytest
import torch
from kills import Told, Work, tell_training
from toy_stack import JOB, ToyStack

from fastent.grokking.train import loop
from fastent.grokking.train.config import preset
from fastent.grokking.train.runs import Job
from fastent.grokking.train.stack import Stack

TOY = dataclasses.replace(JOB, config=dataclasses.replace(JOB.config, max_steps=35), seeds=(0, 1))
REAL = Job(
    "e1",
    "baseline",
    preset(
        "quick", modulus=7, width=8, feedforward=8, heads=2, batch_size=8, probe_size=8,
        evaluate_every=5, max_steps=60, run_past_steps=5, run_past_share=0.0,
    ),
    (1, 0),
)  # fmt: skip


class InTurn(Stack):
    """Real Transformers, told when they grok: the seeds end at different steps."""

    def evaluate(self):
        reached = [self.steps_done >= 20 + 5 * seed for seed in self.seeds]
        return super().evaluate() | {"test_accuracy": torch.tensor(reached, dtype=torch.float64)}


class Together(InTurn):
    shares_launches = staticmethod(lambda device: True)


def training(out, stack):
    """Training, as work whose processes can be killed."""
    told = Told()
    tell_training(told)
    loop.stack_kind = lambda config: stack
    job = TOY if stack is ToyStack else REAL
    return Work(functools.partial(loop.train, job, checkpoint_every=10), out, told=told)


def packing(out):
    """Packing of runs into a file that holds some of them already."""
    from fastent.grokking.experiments import data

    runs, told = out.with_name("runs"), Told()
    loop.stack_kind = lambda config: ToyStack
    loop.train(JOB, runs)
    stored = data.read_runs(runs)
    (old,) = data.pack(stored[:2], out)
    told.phase_of(data, "pack", "packing")
    return Work(lambda out: data.pack(stored, out), out, {old.name: old.read_bytes()}, told)


def reporting(out):
    """Writing of a report over an older one. Its figures are drawn before: what is killed is the writing."""
    from fastent.grokking.experiments import document, report

    runs, told = out.with_name("runs"), Told()
    loop.stack_kind = lambda config: ToyStack
    loop.train(JOB, runs)
    sections = report.make_sections(runs, out)
    old = {f"figures/{figure.name}.svg": b"<svg/>" for figure in document.figures_of(sections)}
    old |= {"index.html": b"old", "report.md": b"old"}
    for figure in document.figures_of(sections):
        assert figure.light
    report.make_sections = lambda *arguments: sections
    told.phase_of(report, "write_report", "report writing")
    return Work(lambda out: report.write_report(runs, out), out, old, told)


def whole_files(work):
    """See that each file is what it was before or what it becomes, or lies under a temporary name."""
    for path in work.out.rglob("*"):
        name = str(path.relative_to(work.out))
        if path.is_file() and path.suffix != ".tmp":
            assert path.read_bytes() in (work.before.get(name), work.whole.get(name)), name


def killed_at_operations(make, out, every, *arguments):
    """Kill at every so many operations, from the first; return kills by phase."""
    torch.set_num_threads(1)
    work, draw = make(out, *arguments), random.Random(1)
    partly = (lambda: None) if make is training else functools.partial(whole_files, work)
    work.at_operations(range(1, work.operations + 1, every), draw, partly)
    return dict(work.landed)


def killed_at_instants(make, out, count, *arguments):
    """Kill at so many instants at least; return kills by phase."""
    torch.set_num_threads(1)
    work, draw = make(out, *arguments), random.Random(2)
    partly = (lambda: None) if make is training else functools.partial(whole_files, work)
    work.at_instants(count, draw, partly)
    return dict(work.landed)


def tell(figure, landed, where):
    for phase, count in landed.items():
        figure(1, f"SIGKILL {where}, while {phase}", count, count)


def test_a_training_killed_at_some_operations_on_files_ends_as_if_never_killed(elsewhere, tmp_path):
    landed = elsewhere(killed_at_operations, training, tmp_path / "out", 31, ToyStack)
    assert sum(landed.values()) >= 6


def test_a_training_killed_at_some_instants_ends_as_if_never_killed(elsewhere, tmp_path):
    assert sum(elsewhere(killed_at_instants, training, tmp_path / "out", 4, ToyStack).values()) >= 4


def test_a_packed_file_is_whole_after_a_kill_at_some_operations_on_it(elsewhere, tmp_path):
    assert sum(elsewhere(killed_at_operations, packing, tmp_path / "out", 2).values()) > 2


@pytest.mark.nightly
@pytest.mark.parametrize(("stack", "every"), [(ToyStack, 1), (InTurn, 4)], ids=["toy", "real"])
def test_a_training_killed_at_any_operation_on_files_ends_as_if_never_killed(
    elsewhere, tmp_path, figure, stack, every
):
    landed = elsewhere(killed_at_operations, training, tmp_path / "out", every, stack)
    assert landed.keys() == {"starting", "training", "logging", "checkpointing", "completing"}
    tell(figure, landed, "at an operation on files")


@pytest.mark.nightly
@pytest.mark.parametrize("stack", [Together, InTurn], ids=["shared launches", "seeds in turn"])
def test_a_training_killed_at_many_instants_ends_as_if_never_killed(elsewhere, tmp_path, figure, stack):
    tell(figure, elsewhere(killed_at_instants, training, tmp_path / "out", 60, stack), "at a random instant")


@pytest.mark.nightly
@pytest.mark.parametrize("make", [packing, reporting])
def test_a_file_that_is_written_over_is_whole_after_a_kill_at_any_operation_or_instant(
    elsewhere, tmp_path, figure, make
):
    tell(figure, elsewhere(killed_at_operations, make, tmp_path / "out", 1), "at an operation on files")
    tell(figure, elsewhere(killed_at_instants, make, tmp_path / "out2", 20), "at a random instant")
