"""Rows 4 and 5 of the faults for every file of a run: whatever is flipped, cut or lost is noticed, and named.

Runs are planted by the trainer's own writing, without training.
"""

import dataclasses
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from toy_stack import without_checksums

pytest.importorskip("tyro")
from fastent.cli import main
from fastent.grokking.experiments import compare
from fastent.grokking.experiments.data import pack, read_run, read_runs, unpack
from fastent.grokking.experiments.folder import Folder, State
from fastent.grokking.experiments.report import origin_section
from fastent.grokking.train import runs
from fastent.grokking.train.checkpoint import Checkpoint
from fastent.grokking.train.config import preset
from fastent.grokking.train.runs import Job, Run, damages, what_is_left
from fastent.grokking.train.storage import (
    Damaged,
    JsonLines,
    RunError,
    RunWarning,
    read_object,
    read_rows,
    seal,
)

EVERY, SAVED = 10, (40, 80)
JOB = Job("e1", "baseline", preset("quick", width=8, heads=1, evaluate_every=EVERY, max_steps=120), (0, 1))
ENVIRONMENT = {"torch": "2.0", "cpu": "any", "threads": 1, "device": "cpu", "commit": None}
CLOCKS = {"time": 1.7e9, "seconds": 0.25}


def plant(out, seed=0, *, last=100, done=True):
    """Write what a run leaves that trained up to step `last`: complete, or killed there."""
    noise = random.Random(seed)
    with Run(out, JOB, seed, ENVIRONMENT) as run:
        run.begin()
        run.timing.append({"event": "start", "step": 0, **CLOCKS})
        for step in range(0, last + 1, EVERY):
            test = float(step >= 60)
            run.record({
                "step": step, "train_loss": noise.random(), "train_accuracy": float(step >= 20),
                "test_loss": noise.random(), "test_accuracy": test, "parameter_norm": 10 + noise.random(),
                "entropy": noise.random(), "entropy_status": "ok", "effective_rank": None,
            })  # fmt: skip
            run.timing.append({"event": "evaluation", "step": step, "seeds": 2, **CLOCKS})
            if step in (*SAVED, last) if done else step in SAVED:
                state = {"monitor": {"history": [noise.random(), None]}}
                run.save(Checkpoint(step, {"weight": torch.arange(step, step + 8.0)}, state))
                run.keep_newest(2)
        if done:
            run.finish(last, "grokked", CLOCKS)
            run.keep_last()
    return run.path


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a test cannot cut the power


def flips(path, count, seed=0):
    """Turn one bit of a file, `count` times at seeded places, always beginning with what was there."""
    whole, draw = path.read_bytes(), random.Random(seed)
    for place in draw.sample(range(8 * len(whole)), min(count, 8 * len(whole))):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        yield place
    path.write_bytes(whole)


def cuts(path, count, seed=0):
    """Cut a file at seeded lengths, at nothing, and at the ends of its lines; then put it back."""
    whole, draw = path.read_bytes(), random.Random(seed)
    lines = [place + 1 for place, byte in enumerate(whole[:-1]) if byte == 10]
    for length in {
        0,
        len(whole) - 1,
        *draw.sample(range(len(whole)), min(len(whole), count)),
        *draw.sample(lines, min(len(lines), count)),
    }:
        path.write_bytes(whole[:length])
        yield length
    path.write_bytes(whole)


def noticed(run):
    """See that each reader of a complete run that reads what is damaged says so, and that `verify` does."""
    found = damages(run, checkpoint=True)
    assert len(found) == 1
    (damage,) = found
    assert str(damage.path) in str(damage)
    assert damage.expected != damage.found
    if damage.path.name.startswith("checkpoint-"):
        assert read_run(run).done is not None  # no report reads it
        return
    with pytest.raises(RunError, match=str(damage.path)):
        read_run(run)
    (state,) = Folder(run).look()
    assert (state.state, state.detail) == (State.DAMAGED, str(damage))
    with pytest.raises(RunError, match=str(damage.path)), Run(run.parent, JOB, 0, ENVIRONMENT):
        pass


def check_complete(out, count):
    run = plant(out)
    assert damages(run, checkpoint=True) == []
    tried = 0
    for path in sorted(run.iterdir()):
        for change in (flips, cuts):
            for _ in change(path, count):
                noticed(run)
                tried += 1
        kept = path.read_bytes()
        path.unlink()
        if path.name != "DONE":
            noticed(run)
        path.write_bytes(kept)
    assert damages(run, checkpoint=True) == []
    return tried


def test_no_bit_of_a_complete_run_can_be_turned_and_no_file_cut_or_lost_without_notice(tmp_path):
    assert check_complete(tmp_path, 2) > 30


@pytest.mark.nightly
def test_no_bit_of_a_complete_run_can_be_turned_without_notice_at_thousands_of_places(tmp_path, figure):
    tried = check_complete(tmp_path, 500)
    assert tried > 6_000
    figure(4, "a bit turned, or a cut, in any file of a run that is complete", tried, tried)


def rows_kept(run):
    """Open a run as a resume does: the rows it goes on from, and whether it said that anything is amiss."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RunWarning)
        try:
            with Run(run.parent, JOB, 0, ENVIRONMENT) as opened:
                checkpoint = opened.newest()
                opened.begin()
                opened.rewind(checkpoint.step if checkpoint else None)
                return read_rows(opened.metrics.path, 0)[0], checkpoint, bool(caught)
        except RunError:
            return None, None, True


def check_interrupted(out, count):
    run = plant(out, last=90, done=False)
    whole, _, said = rows_kept(run)
    assert ([row["step"] for row in whole], said) == (list(range(0, 81, EVERY)), False)
    shutil.rmtree(run)
    before = {path: path.read_bytes() for path in plant(out, last=90, done=False).iterdir()}
    tried = 0
    for path in sorted(before):
        for change in (flips, cuts):
            for place in change(path, count):
                found, step = what_is_left(run)
                rows, checkpoint, said = rows_kept(run)
                tried += 1
                if rows is not None:
                    assert rows == whole[: len(rows)], (path.name, change.__name__, place)
                    assert checkpoint is None or len(rows) == checkpoint.step // EVERY + 1
                    assert (checkpoint.step if checkpoint else 0) == step
                # A log cut short is what a crash leaves, and a checkpoint before the last is not read.
                crash = change is cuts and path.suffix == ".jsonl"
                assert said or crash or "checkpoint-40" in path.name, (path.name, change.__name__, place)
                assert found or path.suffix == ".jsonl", (path.name, change.__name__, place)
                for each, data in before.items():
                    if not each.exists() or each.read_bytes() != data:
                        each.write_bytes(data)
    return tried


def test_no_bit_of_an_interrupted_run_can_be_turned_without_notice_and_only_whole_rows_go_on(tmp_path):
    assert check_interrupted(tmp_path / "runs", 2) > 40


@pytest.mark.nightly
def test_no_bit_of_an_interrupted_run_can_be_turned_without_notice_at_thousands_of_places(tmp_path, figure):
    tried = check_interrupted(tmp_path / "runs", 300)
    assert tried > 4_000
    figure(4, "a bit turned, or a cut, in any file of a run that is interrupted", tried, tried)


def told(capsys, *arguments):
    """Exit status and output of `fastent verify`."""
    status = main(["verify", *map(str, arguments)])
    return status, capsys.readouterr().out


def flip(path, place=0.5):
    """Turn one bit at a share of the way through a file."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)


def test_verify_says_that_all_is_good_and_names_what_it_passes_over(tmp_path, capsys, monkeypatch):
    plant(tmp_path, 0)
    plant(tmp_path, 1, last=90, done=False)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "private").mkdir()
    real = Path.is_file

    def is_file(path):
        if path.parent.name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert told(capsys, tmp_path) == (0, f"{tmp_path}: 2 good\nno runs, skipped: notes.txt, private/\n")


def test_a_run_that_ends_while_it_is_verified_is_good(tmp_path, capsys, monkeypatch):
    run, over = plant(tmp_path / "runs", last=90, done=False), plant(tmp_path / "over")
    read = runs.read_checkpoint

    def read_late(path, step):
        if not (run / "DONE").exists():
            shutil.copytree(over, run, dirs_exist_ok=True)
            for name in ("checkpoint-40.json", "checkpoint-40.safetensors"):
                (run / name).unlink()
        return read(path, step)

    monkeypatch.setattr(runs, "read_checkpoint", read_late)
    assert told(capsys, run) == (0, f"{run}: 1 good\n")
    assert (run / "DONE").exists()


def test_verify_names_what_is_damaged_and_the_command_that_makes_it_again(tmp_path, capsys):
    whole, broken = plant(tmp_path, 0), plant(tmp_path, 1)
    line = (broken / "metrics.jsonl").read_bytes().index(b"\n") + 40
    data = bytearray((broken / "metrics.jsonl").read_bytes())
    data[line] ^= 1
    (broken / "metrics.jsonl").write_bytes(data)
    status, out = told(capsys, tmp_path)
    assert status == 1
    first, second, third, command, _, last = out.splitlines()
    assert first == f"{broken}: damaged"
    assert second.startswith(f"  {broken / 'metrics.jsonl'}: row 2 is damaged: expected crc32 ")
    assert third == f"  put what is damaged back from a copy, or move {broken} away, and this trains it anew:"
    assert command.split()[:3] == ["fastent", "run", "e1"]
    assert command.split()[-4:] == ["--seeds", "1", "--out", str(tmp_path)]
    assert last == f"{tmp_path}: 1 good, 1 damaged"
    status, out = told(capsys, tmp_path, "--json")
    good, damaged = json.loads(out)["runs"]
    assert status == 1
    assert (good["path"], good["state"], good["damages"]) == (str(whole), "good", [])
    assert damaged["command"] == command.strip()
    (damage,) = damaged["damages"]
    assert (damage["file"], damage["row"]) == (str(broken / "metrics.jsonl"), 2)
    assert damage["expected"].startswith("crc32 ")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DONE", "or remove DONE: no result is lost, and this closes the run again:"),
        ("timing.jsonl", "or remove DONE: no result is lost"),
        ("environment.json", "or remove environment.json and DONE: no result is lost"),
        ("checkpoint-100.safetensors", "the metrics are whole, the weights are not: put"),
        ("config.json", "away, and this trains it anew:"),
    ],
)
def test_the_remedy_goes_by_what_is_damaged_of_a_complete_run(tmp_path, capsys, name, said):
    run = plant(tmp_path)
    flip(run / name)
    status, out = told(capsys, run)
    assert (status, said in out) == (1, True), out
    if name in ("DONE", "timing.jsonl", "environment.json"):  # and it helps
        for gone in {name, "DONE"} - {"timing.jsonl"}:
            (run / gone).unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RunWarning)
            with Run(tmp_path, JOB, 0, ENVIRONMENT) as opened:
                opened.begin()
                assert opened.newest().step == 100
                opened.rewind(100)
                opened.finish(100, "grokked", CLOCKS)
        assert told(capsys, run)[0] == 0


def test_an_interrupted_run_goes_on_from_the_newest_checkpoint_whose_rows_are_whole(tmp_path, capsys):
    run = plant(tmp_path, last=90, done=False)
    flip(run / "checkpoint-80.safetensors")
    status, out = told(capsys, run)
    assert status == 1
    assert "checkpoint-80.safetensors: damaged: expected sha256" in out
    assert "\n  this goes on from step 40 and writes again what follows:\n  fastent run e1 " in out
    flip(run / "metrics.jsonl", 0.01)
    assert f"or move {run} away" in told(capsys, run)[1]


def test_runs_and_packed_files_without_checksums_are_unchecked_and_with_them_good(
    tmp_path, capsys, three_runs
):
    assert told(capsys, three_runs) == (
        0, f"{three_runs}: 3 unchecked (from before there were checksums)\n",
    )  # fmt: skip
    pack(read_runs(three_runs), tmp_path / "packed")
    path = tmp_path / "packed" / "e1-baseline-add.parquet"
    assert told(capsys, path) == (0, f"{path}: 1 good\n")
    run = plant(tmp_path / "half", last=90, done=False)
    without_checksums(run)
    (run / "config.json").write_bytes(seal(read_object(run / "config.json") | {"schema_version": 2}))
    unchecked = (0, f"{run}: 1 unchecked (from before there were checksums)\n")
    assert told(capsys, run) == unchecked  # its settings alone are checked
    JsonLines(run / "metrics.jsonl", sums=True).append({"step": 100})
    assert told(capsys, run) == (0, f"{run}: 1 good\n")
    results = Path(__file__).parents[3] / "bench" / "results" / "paper"
    status, out = told(capsys, results)
    assert (status, "damaged" in out) == (0, False)


def test_no_bit_of_a_packed_file_can_be_turned_and_no_end_cut_without_notice(tmp_path, three_runs, capsys):
    (path,) = pack(read_runs(three_runs), tmp_path / "packed")
    runs = unpack(path)
    for change in (flips, cuts):
        for place in change(path, 40):
            with pytest.raises(
                Damaged, match=r"add\.parquet: damaged: expected .*, found .* pack its runs again"
            ):
                unpack(path)
            assert place is not None
    assert unpack(path) == runs
    flip(path)
    status, out = told(capsys, path)
    assert (status, "pack its runs again" in out) == (1, True)


def test_a_copy_of_a_run_is_the_run_and_counts_once_by_whatever_reads_it(tmp_path, capsys):
    run = plant(tmp_path / "runs")
    plant(tmp_path / "runs", 1)
    shutil.copytree(run, tmp_path / "runs" / "e1-baseline-add-seed0.bak")
    with pytest.warns(
        RunWarning, match="seed0 and e1-baseline-add-seed0.bak are one run, by settings and seed"
    ) as told_of:
        stored = read_runs(tmp_path / "runs")
    assert len(told_of) == 1
    assert "another from step" not in str(told_of[0].message)
    assert [(each.name, each.copies) for each in stored] == [
        (run.name, (f"{run.name}.bak",)), ("e1-baseline-add-seed1", ()),
    ]  # fmt: skip
    states = Folder(tmp_path / "runs").look()
    assert [(state.name, state.copies) for state in states] == [
        (run.name, (f"{run.name}.bak",)), ("e1-baseline-add-seed1", ()),
    ]  # fmt: skip
    assert main(["runs", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "2 runs: 2 complete" in out
    assert f"{run.name} lies there again, and counts once: {run.name}.bak" in out


def test_a_run_that_is_there_packed_too_counts_once_and_a_copy_that_differs_is_said_to(tmp_path):
    run = plant(tmp_path)
    pack(read_runs(tmp_path), tmp_path)
    with pytest.warns(
        RunWarning, match=r"seed0 and e1-baseline-add-seed0 in e1-baseline-add\.parquet are one run"
    ):
        (stored,) = read_runs(tmp_path)
    assert (stored.packed, stored.copies) == (None, (f"{run.name} in e1-baseline-add.parquet",))
    (tmp_path / "e1-baseline-add.parquet").unlink()
    noise = random.Random(5)
    shutil.copytree(run, tmp_path / "other")
    rewritten(tmp_path / "other" / "metrics.jsonl", lambda row: row | {"entropy": noise.random()})
    (tmp_path / "other" / "DONE").unlink()
    with pytest.warns(
        RunWarning, match=r"count once, as e1-baseline-add-seed0; other is another from step 0 on"
    ):
        (stored,) = read_runs(tmp_path)
    assert stored.path == run


def rewritten(path, change):
    rows = JsonLines(path).rows
    path.unlink()
    log = JsonLines(path, sums=True)
    for row in rows:
        log.append(change(row))
    log.close()


def test_runs_of_other_settings_seeds_or_kinds_are_no_copies_and_measures_make_none_another(tmp_path):
    def identity_of(job, seed=0):
        with Run(tmp_path / str(len(list(tmp_path.iterdir()))), job, seed, ENVIRONMENT) as run:
            run.begin()
        return read_run(run.path).identity

    changed = dataclasses.replace(JOB.config, learning_rate=0.5)
    others = [
        identity_of(JOB),
        identity_of(JOB, 1),
        identity_of(dataclasses.replace(JOB, config=changed)),
        identity_of(dataclasses.replace(JOB, experiment="e5")),
        identity_of(dataclasses.replace(JOB, condition="losses-0.1")),
    ]
    assert len(set(others)) == len(others)
    measured = dataclasses.replace(JOB.config, measures=("logit_scale",))
    assert identity_of(dataclasses.replace(JOB, config=measured, seeds=(0,))) == others[0]


def test_numbers_written_with_a_point_and_without_are_one_setting(tmp_path):
    first, second = (
        dataclasses.replace(JOB, config=dataclasses.replace(JOB.config, weight_decay=decay, betas=betas))
        for decay, betas in ((1.0, (0.0, 0.98)), (1, (0, 0.98)))
    )
    records = [vars(job) | {"seed": 0, "config": job.settings()} for job in (first, second)]
    assert records[0]["config"] == records[1]["config"]
    assert json.dumps(records[0]["config"]) != json.dumps(records[1]["config"])
    assert runs.identity(records[0]) == runs.identity(records[1])


def test_compare_sets_no_copy_beside_its_run(tmp_path, capsys):
    run = plant(tmp_path)
    shutil.copytree(run, tmp_path / f"{run.name}.bak")
    assert main(["compare", str(run), str(tmp_path / f"{run.name}.bak")]) == 1
    said = capsys.readouterr().err
    assert "a comparison needs complete runs of two settings, and there is only e1-baseline-add" in said
    assert f"{run.name}.bak is {run.name} again, counted once" in said


def test_compare_says_which_runs_of_a_place_are_copies_of_anothers(tmp_path, three_runs):
    shutil.copytree(three_runs, tmp_path / "again")
    (said,) = compare.read([three_runs, tmp_path / "again"]).left_out
    assert said == (
        f"{tmp_path / 'again'}: e1-baseline-add-seed0, e1-baseline-add-seed1, e1-baseline-add-seed2: the same in "
        f"{three_runs / 'e1-baseline-add'}, copies and no other runs"
    )


@pytest.mark.filterwarnings("ignore::fastent.grokking.train.storage.RunWarning")
def test_a_report_leaves_a_damaged_run_out_by_name_and_names_copies(tmp_path):
    for seed in (0, 1):
        plant(tmp_path / "runs", seed)
    flip(tmp_path / "runs" / JOB.run_name(1) / "metrics.jsonl")
    shutil.copytree(tmp_path / "runs" / JOB.run_name(0), tmp_path / "runs" / "copy")
    skipped = {}
    stored = read_runs(tmp_path / "runs", skipped)
    assert [run.seed for run in stored] == [0]
    assert "metrics.jsonl: row 6 is damaged: expected crc32" in skipped[JOB.run_name(1)]
    section = origin_section(stored, tmp_path / "runs", tmp_path / "report", skipped)
    (table,) = (block for block in section.blocks if getattr(block, "columns", ())[:1] == ("folder",))
    assert table.rows[0][3] == "complete: grokked; lies there again: copy"
