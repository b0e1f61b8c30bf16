"""The commands of a report make the runs that it was made from."""

import dataclasses
import json
import shlex

import pytest

from fastent import cli
from fastent.experiments import origin, run_summary
from fastent.experiments.jobs import JOBS
from fastent.experiments.stored import read_runs
from fastent.train import sweep
from fastent.train.presets import preset


def write(out, job):
    for seed in job.seeds:
        folder = out / job.run_name(seed)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "schema_version": 1, "experiment": job.experiment, "condition": job.condition, "seed": seed,
            "stack": list(job.seeds), "config": job.settings(),
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"learning_rate": 0.003, "max_steps": 8000},
        {"hidden": (64, 32), "equals_token": True, "weight_decay": 0.5},
    ],
    ids=lambda given: ", ".join(given) or "the preset",
)
@pytest.mark.parametrize("name", ["quick", "paper"])
def test_every_command_asks_for_the_runs_it_stands_for(tmp_path, monkeypatch, name, given):
    made = {}
    for experiment in JOBS:
        for job in JOBS[experiment](preset(name, **given), (0, 1, 3, 4, 5, 8)):
            write(tmp_path, job)
            made |= {job.run_name(seed): job.settings() for seed in job.seeds}
    asked = {}
    monkeypatch.setattr(
        sweep,
        "run_jobs",
        lambda jobs, *_, **__: (
            asked.update({job.run_name(s): job.settings() for job in jobs for s in job.seeds}) or []
        ),
    )
    monkeypatch.setattr(run_summary, "print_summary", lambda *arguments: None)
    commands = origin.commands(read_runs(tmp_path), tmp_path / "elsewhere")
    assert len(commands) == len(
        {job.experiment for make in JOBS.values() for job in make(preset(name), (0,))}
    )
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["fastent", "run"]
        assert cli.main(words[1:]) == 0
    assert asked == made


def test_seeds_are_written_as_the_command_line_reads_them():
    assert origin.ranges({0, 1, 2, 5, 7, 8}) == "0-2,5,7-8"
    assert cli.parse_seeds(origin.ranges({4, 0, 2, 3})) == (0, 2, 3, 4)


def test_a_run_of_an_unknown_experiment_gets_its_preset_alone(tmp_path):
    from fastent.train.runs import Job

    write(tmp_path, Job("e99", "baseline", dataclasses.replace(preset("paper"), weight_decay=0.5), (0,)))
    assert origin.commands(read_runs(tmp_path), tmp_path) == [
        f"fastent run e99 --preset paper --seeds 0 --out {tmp_path}"
    ]


@pytest.mark.parametrize("name", ["quick", "paper"])
def test_runs_of_all_experiments_of_one_preset_are_of_one_setting_and_one_run_of_another_is_not(
    tmp_path, name
):
    for experiment in JOBS:
        for job in JOBS[experiment](preset(name, max_steps=7000), (0, 1)):
            write(tmp_path, job)
    assert origin.of_one_setting(read_runs(tmp_path))
    (job,) = JOBS["e1"](preset({"quick": "paper", "paper": "quick"}[name], max_steps=7000), (2,))
    write(tmp_path, job)
    assert not origin.of_one_setting(read_runs(tmp_path))


def test_runs_of_a_kind_that_no_experiment_asks_for_are_compared_by_their_settings(tmp_path):
    from fastent.train.runs import Job

    config = dataclasses.replace(preset("paper"), weight_decay=0.5)
    write(tmp_path, Job("e99", "baseline", config, (0, 1)))
    assert origin.of_one_setting(read_runs(tmp_path))
    write(tmp_path, Job("e99", "baseline", preset("paper"), (2,)))
    assert not origin.of_one_setting(read_runs(tmp_path))


def test_a_setting_younger_than_the_runs_does_not_set_them_apart(tmp_path):
    (job,) = JOBS["e1"](preset("paper"), (0, 1))
    write(tmp_path, job)
    path = tmp_path / job.run_name(1) / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["separate_tokens"]
    path.write_text(json.dumps(record))
    assert origin.of_one_setting(read_runs(tmp_path))
