"""Row 7 of the faults, which seeds train together, and what of the environment is remembered."""

import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import warnings

import pytest
import torch
from toy_stack import CONFIG, JOB, contents, without_checksums

from fastent.grokking.train import environment
from fastent.grokking.train.checkpoint import read_checkpoint, write_checkpoint
from fastent.grokking.train.environment import describe_environment
from fastent.grokking.train.loop import train
from fastent.grokking.train.runs import Job, Run, check_rows, named_as_before, plan_stacks
from fastent.grokking.train.storage import (
    Interrupted,
    RunError,
    RunLock,
    RunLocked,
    RunWarning,
    read_object,
    seal,
)
from fastent.grokking.train.sweep import _check_folder as check_folder

OTHER = dataclasses.replace(JOB, config=dataclasses.replace(JOB.config, learning_rate=0.5, betas=(0.8, 0.9)))
CHANGES = (
    "config.betas: [0.9, 0.98] in the folder, [0.8, 0.9] now\n"
    "  config.learning_rate: 0.001 in the folder, 0.5 now"
)


def edit_config(out, seed, **changes):
    path = out / JOB.run_name(seed) / "config.json"
    path.write_bytes(seal({**read_object(path), **changes}))


def test_config_json_holds_every_setting_and_the_stack(toy, tmp_path):
    toy(tmp_path)
    record = read_object(tmp_path / JOB.run_name(2) / "config.json")
    settings = record.pop("config")
    assert record == {
        "schema_version": 2, "experiment": "e1", "condition": "baseline", "seed": 2, "stack": [0, 2, 1],
    }  # fmt: skip
    assert settings.keys() == {field.name for field in dataclasses.fields(JOB.config)}
    assert Job.of_settings("e1", "baseline", settings, JOB.seeds) == JOB


def test_a_folder_that_is_older_than_a_setting_is_of_what_was_done_before_it(toy, tmp_path):
    toy(tmp_path)
    for seed in JOB.seeds:
        without_checksums(tmp_path / JOB.run_name(seed))
        old = {k: v for k, v in JOB.settings().items() if k not in ("final_norm", "start", "sampling")}
        edit_config(tmp_path, seed, config=old)
    before = contents(tmp_path)
    toy(tmp_path)
    assert contents(tmp_path) == before
    drawn = dataclasses.replace(JOB, config=dataclasses.replace(JOB.config, sampling="replacement"))
    with pytest.raises(
        RunError, match=r"configuration:\n  config\.sampling: epochs in .*, replacement now\n"
    ):
        toy(tmp_path, drawn)
    with pytest.raises(ValueError, match=r"other settings \(sampling 'epochs', now 'replacement'\)"):
        check_folder([dataclasses.replace(drawn, seeds=(3,))], tmp_path)


def test_a_folder_from_before_there_were_checksums_goes_on_under_a_schema_that_older_ones_refuse(half, toy):
    out = half(27)
    for seed in JOB.seeds:
        without_checksums(out / JOB.run_name(seed))
    before = read_object(out / JOB.run_name(0) / "config.json")
    toy(out)
    assert read_object(out / JOB.run_name(0) / "config.json") == before | {"schema_version": 2}


def test_a_holder_that_lost_its_lock_before_it_began_changes_nothing(half, toy):
    out = half(27)
    run = Run(out, dataclasses.replace(JOB, config=OTHER.config), 0, {}, force=True)
    with run:
        (run.path / "lock").unlink()
        with RunLock(run.path):
            before = contents(out)
            for change in (run.begin, lambda: run.rewind(10)):
                with pytest.raises(RunLocked, match="was removed or taken"):
                    change()
            assert contents(out) == before


def test_another_configuration_is_refused_with_a_diff_and_changes_nothing(half, toy):
    out = half(27)
    before = contents(out)
    with pytest.raises(RunError, match=r"config\.json was written with another configuration") as caught:
        toy(out, OTHER)
    assert CHANGES in str(caught.value)
    assert "--force" in str(caught.value)
    assert contents(out) == before


def test_force_goes_on_with_the_new_configuration_says_what_it_ignores_and_records_it(half, toy, warned):
    out = half(27)
    toy(out, OTHER, force=True)
    assert len(warned()) == 3
    assert all("--force ignores that the folder has\n  " + CHANGES in text for text in warned())
    record = json.loads((out / JOB.run_name(1) / "config.json").read_text())
    assert record["config"]["learning_rate"] == 0.5
    assert record["forced"] == [{"checkpoint": 20, "changes": CHANGES.split("\n  ")}]
    toy(out, OTHER)  # is its configuration now


def test_a_damaged_environment_of_one_seed_is_refused_before_anything_of_the_others_is_changed(half, toy):
    out = half(27)
    for seed in JOB.seeds:
        without_checksums(out / JOB.run_name(seed))  # whose configuration would be written anew
    (out / JOB.run_name(1) / "environment.json").write_text("[")
    before = contents(out)
    with pytest.raises(RunError, match=r"seed1/environment\.json: damaged"):
        toy(out)
    assert contents(out) == before


class StopAfterTwoSteps:
    asked = 0

    @property
    def signal(self):
        self.asked += 1
        return 15 if self.asked > 2 else None


@pytest.mark.parametrize(
    "changes", [{"width": 8}, {"modulus": 5}, {"width": 1, "heads": 1}, {"model": "mlp", "hidden": (4,)}]
)
def test_settings_of_other_shapes_are_refused_under_force_too_and_the_command_of_before_goes_on(
    tmp_path, changes
):
    small = {
        "modulus": 7,
        "width": 4,
        "heads": 1,
        "feedforward": 4,
        "batch_size": 8,
        "probe_size": 4,
        "max_steps": 4,
    }
    job = dataclasses.replace(
        JOB, config=dataclasses.replace(CONFIG, evaluate_every=2, **small), seeds=(0, 1)
    )
    with pytest.raises(Interrupted):
        train(job, tmp_path, stop=StopAfterTwoSteps())
    (tmp_path / job.run_name(0) / "FAILED").write_text("{}")
    (tmp_path / job.run_name(0) / "config.json.tmp").write_text("of a killed process")
    before = contents(tmp_path)
    other = dataclasses.replace(job, config=dataclasses.replace(job.config, **changes))
    with pytest.raises(RunError, match=r"seed0: checkpoint 2 does not fit the settings given now") as caught:
        train(other, tmp_path, force=True)
    assert re.search(r"parameter\.\S+ has shape .* in the state, and \(.*\) is needed", str(caught.value))
    assert "Nothing was changed: give the settings of the folder" in str(caught.value)
    assert contents(tmp_path) == before
    train(job, tmp_path)
    assert (tmp_path / job.run_name(1) / "DONE").exists()


def forge(run, step, **changes):
    """Write a checkpoint whose sums are right and whose content is not."""
    old = read_checkpoint(run, step)
    write_checkpoint(run, dataclasses.replace(old, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": {}}, "monitor: 'monitor'"),
        ({"state": {"monitor": {"version": "4"}}}, "monitor: "),
        ({"tensors": {"weights": torch.zeros(8, 3), "steps": torch.tensor(7)}}, "its tensors are of step 7"),
        ({"tensors": {"weights": torch.zeros(1), "steps": torch.tensor(20)}}, r".*\(1,\)"),
    ],
)
def test_a_checkpoint_of_another_shape_with_the_right_sums_is_refused_and_nothing_changed(
    half, toy, changes, said
):
    out = half(27)
    forge(out / JOB.run_name(2), 20, **changes)
    before = contents(out)
    with pytest.raises(RunError, match=rf"seed2: checkpoint 20 does not fit .*\n  {said}"):
        toy(out)
    assert contents(out) == before


def test_a_newer_schema_is_refused_and_force_ignores_the_fields_it_does_not_know(half, toy, warned):
    out = half(27)
    edit_config(out, 2, schema_version=7, curriculum="easy first")
    with pytest.raises(RunError, match="schema_version: 7, of a newer fastent; this one knows 2") as caught:
        toy(out)
    assert "curriculum: easy first in the folder, (absent) now" in str(caught.value)
    toy(out, force=True)
    (text,) = warned()
    assert "curriculum: easy first" in text
    assert (out / JOB.run_name(2) / "DONE").exists()


def test_a_complete_run_of_another_configuration_is_refused_and_left_as_it_is_under_force(toy, tmp_path):
    toy(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RunError, match="learning_rate"):
        toy(tmp_path, OTHER)
    toy(tmp_path, OTHER, force=True)
    assert contents(tmp_path) == before


def test_a_configuration_that_is_none_is_refused_by_name(half, toy):
    out = half(27)
    (out / JOB.run_name(2) / "config.json").write_text("{}")
    with pytest.raises(
        RunError, match=r"seed2/config\.json is not what its name says, for it has no experiment: put it back"
    ):
        toy(out)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stack": [0, "0/../../../x"]}, "stack must hold whole numbers, for they name folders; got '0/../../../x'"),
        ({"stack": [0, -1]}, "stack must hold whole numbers, for they name folders; got -1"),
        ({"stack": {"0": 1}}, "stack must be a list; got {'0': 1}"),
        ({"schema_version": "1"}, "schema_version must be a whole number; got '1'"),
        ({"forced": 3}, "forced must be a list; got 3"),
        ({"guests": [{"kind": "task", "name": []}]}, r"guests\.name must be a text in one line; got \[\]"),
        ({"config": {"measures": ["a\x1b"]}}, r"config\.measures must be a list, each a text in one line"),
        ({"seed": True}, "seed must be a whole number; got True"),
        ({"seed": 10**400}, "seed must be a whole number; got 1000"),
        ({"config": {"width": "4"}}, r"config\.width must be a whole number; got '4'"),
        ({"config": {"criterion": 10**400}}, r"config\.criterion must be a number; got 1000"),
        ({"config": {"betas": [[0.9], 0.98]}}, r"config\.betas must be a list, each a number; got \[\[0\.9\]"),
        ({"config": {"hidden": ["4"]}}, r"config\.hidden must be a list, each a whole number; got \['4'\]"),
        ({"config": {"task": None}}, r"config\.task must be a text in one line; got None"),
        ({"config": []}, r"config must be an object; got \[\]"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_configuration_of_another_shape_is_refused_with_the_field_before_anything_is_written(
    tmp_path, toy, changes, said
):
    run = tmp_path / "out" / JOB.run_name(2)
    run.mkdir(parents=True)
    record = {"schema_version": 1, "experiment": "e1", "condition": "baseline", "seed": 2, "stack": [2]}
    if changes.get("config"):
        changes = {"config": {**JOB.settings(), **changes["config"]}}
    (run / "config.json").write_text(json.dumps({**record, "config": JOB.settings(), **changes}))
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    before = contents(tmp_path)
    job = dataclasses.replace(JOB, seeds=(2,))
    for act in (lambda: plan_stacks(job, run.parent), lambda: toy(run.parent, job)):
        with pytest.raises(
            RunError, match=rf"seed2/config\.json: {said}.*: put it back from a copy, or move"
        ):
            act()
    assert contents(tmp_path) == before
    # Nor is another seed's job stopped by it.
    check_folder([dataclasses.replace(JOB, seeds=(9,))], run.parent)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"event": None}, "event must be a word; got None"),
        ({"seconds": None}, "seconds must be a number; got None"),
        ({"monitor_seconds": None}, "monitor_seconds must be a number; got None"),
        ({"seeds": None}, "seeds must be a number from 1; got None"),
        ({"seeds": 0}, "seeds must be a number from 1; got 0"),
    ],
)
def test_a_row_of_clocks_without_what_it_counts_is_refused(tmp_path, changes, said):
    row = {"event": "evaluation", "step": 5, "time": 9.0, "seconds": 2.0, "monitor_seconds": 0.1, "seeds": 3}
    check_rows(tmp_path / "timing.jsonl", [row])
    with pytest.raises(RunError, match=rf"timing\.jsonl: line 2: {said}"):
        check_rows(tmp_path / "timing.jsonl", [row, row | changes])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"step": "5"}', "step must be a whole number; got '5'"),
        ('{"entropy": 0.5}', "step must be a whole number; got None"),
        ('{"step": 5, "entropy": "low"}', "entropy must be a number or null; got 'low'"),
        ('{"step": 5, "entropy": [0.5]}', r"entropy must be a number or null; got \[0\.5\]"),
        ('{"step": 5, "entropy": NaN}', "entropy must be a number or null; got nan"),
        ('{"step": 5, "entropy": 1e999}', "entropy must be a number or null; got inf"),
        ('{"step": 5, "entropy": ' + "1" * 400 + "}", "entropy must be a number or null; got 1111"),
        ('{"step": 5, "entropy": 1e307}', r"entropy must be from 0 to 1; got 1e\+307"),
        ('{"step": 5, "test_accuracy": -1}', "test_accuracy must be from 0 to 1; got -1"),
        ('{"step": 5, "entropy": true}', "entropy must be a number or null; got True"),
    ],
    ids=lambda value: value[:40],
)
def test_a_row_of_another_shape_is_refused_with_its_line_and_its_field(tmp_path, toy, row, said):
    job = dataclasses.replace(JOB, seeds=(2,))
    toy(tmp_path, job)
    without_checksums(tmp_path / JOB.run_name(2))
    path = tmp_path / JOB.run_name(2) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], row, *lines[2:]]) + "\n")
    before = contents(tmp_path)
    with pytest.raises(RunError, match=rf"seed2/metrics\.jsonl: line 2: {said}.*: put it back from a copy"):
        toy(tmp_path, job)
    assert contents(tmp_path) == before


class Bomb:
    def __reduce__(self):
        return open, ("executed", "w")


def test_a_pickled_checkpoint_in_a_run_folder_is_refused_and_nothing_in_it_runs(
    half, toy, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = half(27)
    (out / JOB.run_name(0) / "checkpoint-25.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(RunError, match=r"checkpoint-25\.pt: a pickled checkpoint is refused"):
        toy(out)
    assert not (tmp_path / "executed").exists()


def test_new_seeds_are_shared_out_over_the_workers(tmp_path):
    ten = dataclasses.replace(JOB, seeds=tuple(range(10)))
    assert [stack.seeds for stack in plan_stacks(ten, tmp_path)] == [ten.seeds]
    assert [stack.seeds for stack in plan_stacks(ten, tmp_path, 3)] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert [stack.seeds for stack in plan_stacks(JOB, tmp_path, 8)] == [(0,), (2,), (1,)]


def test_started_seeds_stay_in_the_stack_they_began_in(half, tmp_path):
    out = half(27)
    more = dataclasses.replace(JOB, seeds=(0, 1, 2, 3, 4))
    assert [stack.seeds for stack in plan_stacks(more, out, 2)] == [(0, 2, 1), (3,), (4,)]
    with pytest.warns(
        RunWarning, match="seeds 1, 2 of e1-baseline started in one stack with seeds asked for"
    ):
        (stack,) = plan_stacks(dataclasses.replace(JOB, seeds=(0,)), out)
    assert stack.seeds == JOB.seeds


def test_another_number_of_threads_on_resume_is_warned_of(half, toy, warned):
    out = half(27)
    torch.set_num_threads(2)
    try:
        toy(out)
    finally:
        torch.set_num_threads(1)
    assert len(warned()) == 3
    assert "it began with threads 1, now 2: the last bits of its numbers may differ" in warned()[0]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Make fastent believe that it runs from a git checkout."""
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(environment.fastent, "__file__", str(tmp_path / "fastent" / "__init__.py"))
    environment.commit.cache_clear()
    yield
    environment.commit.cache_clear()


@pytest.mark.usefixtures("checkout")
def test_without_git_the_run_goes_on_with_one_warning(toy, tmp_path, monkeypatch, warned):
    def missing(*arguments, **options):
        raise FileNotFoundError(2, "No such file or directory", "git")

    monkeypatch.setattr(subprocess, "run", missing)
    toy(tmp_path / "out")
    toy(tmp_path / "again")
    assert len(warned()) == 1
    assert "the commit is not recorded: git failed" in warned()[0]
    record = json.loads((tmp_path / "out" / JOB.run_name(0) / "environment.json").read_text())
    assert record["commit"] is None


@pytest.mark.usefixtures("checkout")
def test_the_commit_is_asked_of_git(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout="abc-dirty\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: answer)
    assert describe_environment()["commit"] == "abc-dirty"


def test_the_environment_names_versions_processor_and_threads():
    found = describe_environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu"
    assert found["cpu"]


def test_a_folder_without_a_row_or_a_checkpoint_counts_as_new(toy, tmp_path, uninterrupted):
    out = tmp_path / "out"
    for seed in JOB.seeds:
        (out / JOB.run_name(seed)).mkdir(parents=True)
        config = uninterrupted[f"{JOB.run_name(seed)}/config.json"].replace(b'"width": 4', b'"width": 12')
        assert b'"width": 12' in config
        (out / JOB.run_name(seed) / "config.json").write_bytes(config)
        (out / JOB.run_name(seed) / "environment.json").write_text('{"threads": 64}')
        (out / JOB.run_name(seed) / "metrics.jsonl").write_bytes(b'{"step": 0, "train_')
    assert [stack.seeds for stack in plan_stacks(JOB, out, 3)] == [(0,), (2,), (1,)]
    with pytest.warns(RunWarning, match="line 1 is torn"):
        toy(out)
    assert contents(out) == uninterrupted
    recorded = json.loads((out / JOB.run_name(0) / "environment.json").read_text())
    assert recorded["threads"] == torch.get_num_threads()


def test_a_seed_of_a_stack_that_was_trained_anew_alone_stays_by_itself(toy, half, tmp_path, uninterrupted):
    out = half(27)
    shutil.rmtree(out / JOB.run_name(2))
    toy(out, dataclasses.replace(JOB, seeds=(2,)))
    alone = {name: data for name, data in contents(out).items() if "seed2/" in name}
    assert json.loads(alone[f"{JOB.run_name(2)}/config.json"])["stack"] == [2]
    stacks = plan_stacks(JOB, out)
    assert [stack.seeds for stack in stacks] == [(0, 1), (2,)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stack in stacks:
            toy(out, stack)
    now = contents(out)
    assert alone.items() <= now.items()
    config = f"{JOB.run_name(1)}/config.json"
    assert now[config] == uninterrupted[config]  # it says with whom it began


def test_a_name_carries_the_changed_settings_and_stays_below_what_a_file_system_takes():
    job = dataclasses.replace(JOB, changed=("hidden", "learning_rate"))
    assert job.run_name(3) == f"e1-baseline-add-hidden=512+128,learning_rate={CONFIG.learning_rate}-seed3"
    every = tuple(field.name for field in dataclasses.fields(CONFIG))
    long = dataclasses.replace(job, changed=every)
    other = dataclasses.replace(long, config=dataclasses.replace(CONFIG, run_past_share=0.25))
    assert len(long.run_name(0)) < 180
    assert long.run_name(0).startswith("e1-baseline-add-task=add,modulus=")
    assert long.run_name(0) != other.run_name(0)
    assert Job.of_settings("e1", "baseline", job.settings(), job.seeds, ["hidden", "learning_rate"]) == job


def test_names_from_before_are_kept_only_where_all_that_has_them_is_of_the_settings_asked_for(half, tmp_path):
    out = half(27)
    asked = dataclasses.replace(JOB, changed=("learning_rate",))
    other = dataclasses.replace(OTHER, experiment="e5", changed=("learning_rate",))
    assert named_as_before([asked, other], tmp_path / "elsewhere") == [asked, other]
    assert named_as_before([asked, other], out) == [JOB, dataclasses.replace(other, changed=())]
    # The plain names are those of other settings, whatever else of the command may be there by chance.
    changed = dataclasses.replace(OTHER, changed=("learning_rate",))
    assert named_as_before([dataclasses.replace(asked, seeds=(0,)), changed], out) == [
        dataclasses.replace(asked, seeds=(0,)),
        changed,
    ]
