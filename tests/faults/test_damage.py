"""Rows 4 to 7 of the faults: files that are cut, flipped, torn, pickled, or of other settings.

Whatever is damaged, the run ends with the bytes of an uninterrupted one, or stops with a message that names the file.
"""

import pickle
import random
import shutil
import warnings

import pytest
from toy_stack import JOB, contents

from fastent.grokking.train.checkpoint import read_checkpoint
from fastent.grokking.train.environment import describe_environment
from fastent.grokking.train.runs import Run
from fastent.grokking.train.storage import PICKLED, CheckpointError, RunError, RunWarning, read_object, seal


def check_noticed(out, path, environment):
    """See that a damaged newest checkpoint is named with what was expected and found, and the one before serves."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path.parent, 20)
    assert caught.value.path == path
    assert caught.value.expected != caught.value.found
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RunWarning)
        with Run(out, JOB, 1, environment) as run:
            assert run.newest().step == 10
    assert [str(each.message) for each in said] == [
        f"falls back to the checkpoint before: {caught.value.finding}"
    ]


@pytest.fixture
def newest(half):
    """Folder of a run that was killed, and the tensors of its newest checkpoint."""
    out = half(27)
    return out, out / JOB.run_name(1) / "checkpoint-20.safetensors"


def check_cuts(out, path, every):
    """Cut the newest checkpoint at every so many bytes of its header and record; return how often."""
    environment, tried = describe_environment(), 0
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    record = path.with_suffix(".json")
    for file, end in ((path, header + 1), (record, record.stat().st_size)):
        whole = file.read_bytes()
        for length in range(0, end, every):
            file.write_bytes(whole[:length])
            check_noticed(out, file, environment)
            tried += 1
        file.write_bytes(whole)
    return tried


def check_flips(out, path, count):
    """Turn one bit of the newest checkpoint, so often."""
    environment, draw = describe_environment(), random.Random(4)
    for number in range(count):
        file = path if number % 2 else path.with_suffix(".json")
        whole = bytearray(file.read_bytes())
        place = draw.randrange(8 * len(whole))
        whole[place // 8] ^= 1 << place % 8
        file.write_bytes(whole)
        check_noticed(out, file, environment)
        whole[place // 8] ^= 1 << place % 8
        file.write_bytes(whole)


def test_a_checkpoint_that_is_cut_or_flipped_is_noticed_and_the_one_before_serves(newest, toy, uninterrupted):
    out, path = newest
    assert check_cuts(out, path, 97) > 5
    check_flips(out, path, 10)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(RunWarning, match="falls back"):
        toy(out)
    assert contents(out) == uninterrupted


@pytest.mark.nightly
def test_a_checkpoint_cut_at_any_byte_of_its_header_or_record_is_noticed_and_the_one_before_serves(
    newest, figure
):
    tried = check_cuts(*newest, 1)
    figure(4, "a checkpoint cut at each byte of its header and of its record", tried, tried)


@pytest.mark.nightly
def test_a_thousand_bits_turned_in_a_checkpoint_are_noticed_and_the_one_before_serves(newest, figure):
    check_flips(*newest, 1000)
    figure(4, "a bit turned in a checkpoint, at a random place", 1000, 1000)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::fastent.grokking.train.storage.RunWarning")
def test_whatever_bit_of_an_interrupted_stack_is_turned_it_ends_as_if_it_were_not_or_stops_with_a_message(
    half, toy, uninterrupted, tmp_path, figure
):
    whole = half(27)
    draw, stopped, tried = random.Random(19), 0, 0
    paths = [
        path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.stat().st_size and path.is_file()
    ]
    for count in range(1000):
        out = tmp_path / "flipped"
        shutil.copytree(whole, out)
        path = out / paths[count % len(paths)]
        data = bytearray(path.read_bytes())
        place = draw.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        tried += 1
        try:
            toy(out)
        except RunError as refusal:
            stopped += 1
            named = str(path) in str(refusal)
            assert named, place
        else:
            assert contents(out) == uninterrupted, (path.name, place)
        shutil.rmtree(out)
    assert stopped < 500
    figure(4, "a bit turned in any file of an interrupted run", tried, tried)


def cut(data, place):
    return data[:place]


def zeros(data, place):
    """What a power cut leaves where a file had grown and its content was not there yet."""
    return data[:place] + bytes(len(data) - place)


def zeros_and_newline(data, place):
    return data[:place] + bytes(len(data) - place - 1) + b"\n"


def check_torn(half, toy, uninterrupted, tmp_path, every):
    """Tear the logs of an interrupted run in their last row, at every so many bytes; return how often."""
    whole, tried = half(27), 0
    for name in ("metrics.jsonl", "timing.jsonl"):
        data = (whole / JOB.run_name(1) / name).read_bytes()
        start = data.rindex(b"\n", 0, -1) + 1
        for place in range(start, len(data), every):
            for tear in (cut, zeros, zeros_and_newline):
                out = tmp_path / "torn"
                shutil.copytree(whole, out)
                (out / JOB.run_name(1) / name).write_bytes(tear(data, place))
                toy(out)
                assert contents(out) == uninterrupted, (name, place, tear.__name__)
                shutil.rmtree(out)
                tried += 1
    return tried


@pytest.mark.filterwarnings("ignore::fastent.grokking.train.storage.RunWarning")
def test_a_log_torn_or_filled_with_zeros_in_its_last_row_is_written_again_and_no_step_twice(
    half, toy, uninterrupted, tmp_path
):
    assert check_torn(half, toy, uninterrupted, tmp_path, 150) >= 6


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::fastent.grokking.train.storage.RunWarning")
def test_a_log_torn_anywhere_in_its_last_row_is_written_again_and_no_step_twice(
    half, toy, uninterrupted, tmp_path, figure
):
    tried = check_torn(half, toy, uninterrupted, tmp_path, 4)
    figure(5, "the last row of a log cut, or filled with zeros from there", tried, tried)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_among_the_checkpoints_is_refused_and_nothing_in_it_runs(
    newest, toy, tmp_path, uninterrupted, figure
):
    out, path = newest
    trace = tmp_path / "executed"
    for suffix in PICKLED:
        bomb = path.with_name(f"checkpoint-25{suffix}")
        bomb.write_bytes(pickle.dumps(Bomb(str(trace))))
        with pytest.raises(RunError, match=f"{bomb}: a pickled checkpoint is refused"):
            toy(out)
        bomb.unlink()
    path.write_bytes(pickle.dumps(Bomb(str(trace))))
    with pytest.warns(RunWarning, match="falls back"):
        toy(out)
    assert not trace.exists()
    assert contents(out) == uninterrupted
    figure(
        6,
        "a pickle under each suffix of one, and in the place of tensors",
        len(PICKLED) + 1,
        len(PICKLED) + 1,
    )


def other(value):
    """Make another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value + 1
    return f"{value}-other"


def test_each_setting_that_differs_is_named_and_nothing_is_changed(newest, toy, uninterrupted, figure):
    out, path = newest
    config = path.with_name("config.json")
    whole, record = config.read_bytes(), read_object(config)
    places = [(record, name) for name in ("condition", "experiment", "seed")]
    places += [(record["config"], name) for name, value in record["config"].items() if value is not None]
    for holder, name in places:
        before, holder[name] = holder[name], other(holder[name])
        config.write_bytes(seal(record))
        found = contents(out)
        with pytest.raises(RunError, match=rf"(?s)config\.json.*\b{name}\b") as caught:
            toy(out)
        assert str(config) in str(caught.value)
        assert contents(out) == found, name
        holder[name] = before
    config.write_bytes(whole)
    toy(out)
    assert contents(out) == uninterrupted
    figure(7, "a setting that differs from the folder's", len(places), len(places))
