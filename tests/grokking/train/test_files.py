"""Row 5 of the faults, and row 3 for single files."""

import errno
import json
import os
import re
import warnings
import zlib
from pathlib import Path

import pytest

from fastent.grokking.train import storage
from fastent.grokking.train.storage import (
    Damaged,
    JsonLines,
    RunError,
    RunWarning,
    dump_json,
    make_folder,
    read_object,
    read_regular,
    read_rows,
    remove_temporaries,
    seal,
    unseal,
    write_atomically,
)


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_atomically(path, b"old")

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left on device.*config\.json"):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:3]))
    write_atomically(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_the_content_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    write_atomically(tmp_path / "x", b"0")
    assert order == ["fsync", "replace", "fsync"]


def test_a_new_folder_is_in_those_above_it_before_anything_is_written_there(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), real(file))[1])
    make_folder(tmp_path / "runs" / "seed0")
    assert synced == [(tmp_path / "runs").stat().st_ino, tmp_path.stat().st_ino]
    make_folder(tmp_path / "runs" / "seed0")
    assert len(synced) == 2


def test_temporaries_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    for name in ("a.tmp", "checkpoint-5.safetensors.tmp", "metrics.jsonl"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "mine.tmp").mkdir()
    (tmp_path / "DONE.tmp").symlink_to(tmp_path / "mine.tmp")
    remove_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "mine.tmp"]


def test_a_write_goes_through_no_link_and_names_a_folder_in_the_place_of_its_temporary_file(tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in ("DONE", "DONE.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "DONE", b"{}")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "DONE").is_symlink()
    (tmp_path / "DONE.tmp").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a folder lies where a temporary file belongs.*DONE\.tmp"):
        write_atomically(tmp_path / "DONE", b"[]")
    assert (tmp_path / "DONE").read_bytes() == b"{}"


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_log_that_is_a_link_is_read_and_not_written_through(tmp_path, link):
    (tmp_path / "victim").write_text('{"step": 0}\n{"st')
    link(tmp_path / "metrics.jsonl", tmp_path / "victim")
    with pytest.warns(RunWarning, match="torn"):
        log = JsonLines(tmp_path / "metrics.jsonl")
    for change in (lambda: log.append({"step": 1}), lambda: log.keep(0)):
        with pytest.raises(
            RunError, match=r"metrics\.jsonl is (a link|one file under 2 names), and is not written"
        ):
            change()
    assert (tmp_path / "victim").read_text() == '{"step": 0}\n{"st'


def change_by_another(path):
    with path.open("a") as file:
        file.write('{"step": 1}\n')


def replace_by_another(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("meddle", [change_by_another, replace_by_another])
def test_a_log_that_another_process_changed_is_not_written_to(tmp_path, meddle):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.append({"step": 0})
    meddle(log.path)
    before = log.path.read_bytes()
    with pytest.raises(
        RunError, match=r"metrics\.jsonl was changed by another process since this one read it"
    ):
        log.append({"step": 1})
    assert log.path.read_bytes() == before
    log.close()


@pytest.mark.parametrize("read", [read_regular, lambda path: read_rows(path, 0), JsonLines])
def test_what_is_no_regular_file_is_refused_and_keeps_nobody_waiting(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(RunError, match=f"{path} is no regular file"):
            read(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff{}", "invalid start byte"),
        (b"[1]", r"it holds \[1\], no object"),
        (b"null", "it holds None, no object"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested more than 32 levels deep"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 32 levels deep"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_json_that_is_no_plain_object_is_refused_with_the_file_the_reason_and_the_remedy(
    tmp_path, data, said
):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(
        RunError,
        match=rf"config\.json: damaged: expected a JSON object, found none \(.*{said}.*\): look elsewhere",
    ):
        read_object(path, "look elsewhere")


def test_a_row_nested_without_end_is_a_torn_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")
    assert read_rows(tmp_path / "metrics.jsonl", 0)[0] == [{"step": 0}]


def test_text_from_elsewhere_moves_no_cursor():
    assert storage.printable("a\x1b[2Jb\r\u202e\udc80é\n") == "a\\x1b[2Jb\\r\\u202e\\udc80é\n"


def test_rows_come_back_as_they_were_appended(tmp_path):
    rows = [{"step": 0, "loss": 0.1 + 0.2, "entropy": None}, {"step": 50, "loss": 1e-300, "entropy": 0.5}]
    log = JsonLines(tmp_path / "metrics.jsonl")
    for row in rows:
        log.append(row)
    log.close()
    assert JsonLines(log.path).rows == rows
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == rows


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (b'{"step": 100', "line 3 is torn"),
        (b'{"step": 100}', "line 3 is torn"),
        (b"\x00\x00\x00", "line 3 is torn"),
        (b"\x00\x00\x00\n", "row 3 is damaged: expected a JSON object"),
        (b'{"step": 100}garbage\n{"step": 150}\n', "row 3 is damaged: expected a JSON object"),
        (b"[100]\n", r"row 3 is damaged: expected a JSON object, found b'\[100\]'"),
    ],
    ids=["cut", "without newline", "zeros", "zeros and a newline", "damaged in the middle", "not an object"],
)
def test_what_follows_the_last_whole_row_is_dropped_with_a_warning_and_can_be_written_again(
    tmp_path, tail, said
):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 0}\n{"step": 50}\n'
    path.write_bytes(whole + tail)
    with pytest.warns(RunWarning, match=rf"metrics\.jsonl: {said}.*; {len(tail)} bytes from there"):
        log = JsonLines(path)
    assert path.read_bytes() == whole + tail, "a log that is only read stays as it is"
    log.append({"step": 100})
    log.close()
    assert path.read_bytes() == whole + b'{"step": 100}\n'
    path.write_bytes(whole + tail)
    with pytest.warns(RunWarning):
        log = JsonLines(path)
    log.keep(2)
    assert path.read_bytes() == whole


def test_keep_drops_later_rows_in_the_file_and_appends_after_them(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(4):
        log.append({"step": step})
    log.keep(2)
    log.append({"step": 9})
    log.close()
    assert log.path.read_bytes() == b'{"step": 0}\n{"step": 1}\n{"step": 9}\n'
    assert [row["step"] for row in log.rows] == [0, 1, 9]
    JsonLines(log.path).keep(0)
    assert log.path.read_bytes() == b""


def test_a_row_that_finds_the_disk_full_leaves_no_half_line(tmp_path, monkeypatch):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.append({"step": 0})
    real, calls = os.write, []

    def fills_up(descriptor, data):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, bytes(data)[:5])

    monkeypatch.setattr(os, "write", fills_up)
    with pytest.raises(OSError, match=r"No space left on device.*metrics\.jsonl"):
        log.append({"step": 50})
    assert log.path.read_bytes() == b'{"step": 0}\n'
    assert log.rows == [{"step": 0}]
    log.close()


def test_nan_never_enters_a_file_of_ours(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"loss": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"loss": float("inf")})
    assert not log.path.exists()
    assert storage.dump_json({"b": 1, "a": [2]}) == b'{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'


def checked_log(path, count=4):
    log = JsonLines(path, sums=True)
    for step in range(count):
        log.append({"step": step, "loss": 1 / (1 + step)})
    log.close()
    return path.read_bytes().splitlines(keepends=True)


def opened(path):
    """Open a log; its rows, and what was said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RunWarning)
        log = JsonLines(path, sums=True)
    return [row["step"] for row in log.rows], [str(warning.message) for warning in caught]


def test_a_row_carries_the_crc_of_all_bytes_up_to_it_and_stays_a_row_of_json(tmp_path):
    lines = checked_log(tmp_path / "metrics.jsonl")
    total = 0
    for step, line in enumerate(lines):
        row = json.loads(line)
        body = json.dumps({"step": step, "loss": 1 / (1 + step)})[:-1].encode()
        total = zlib.crc32(body, total)
        assert row == {"step": step, "loss": 1 / (1 + step), "crc32": f"{total:08x}"}
    log = JsonLines(tmp_path / "metrics.jsonl")
    assert log.rows == [{"step": step, "loss": 1 / (1 + step)} for step in range(4)]
    assert log.log.extent(4) == {"bytes": sum(map(len, lines)), "crc32": f"{total:08x}"}


@pytest.mark.parametrize(
    ("change", "kept", "row"),
    [
        (lambda a: [a[0], a[2], a[3]], 1, 2),
        (lambda a: [a[0], a[2], a[1], a[3]], 1, 2),
        (lambda a: [a[0], a[1], a[1], a[2]], 2, 3),
        (lambda a: [a[1], a[2], a[3]], 0, 1),
        (lambda a: [a[0], a[1].replace(b"0.5", b"0.7"), a[2], a[3]], 1, 2),
        (lambda a: [a[0], a[1], b'{"step": 2, "loss": 0.3}\n', a[3]], 2, 3),
        (lambda a: [a[0], a[1], a[2], b'{"step": 3, "loss": 0.25}\n'], 3, 4),
    ],
    ids=["missing", "swapped", "doubled", "without the first", "changed", "without checksum", "last without"],
)
def test_a_log_is_read_up_to_the_first_row_that_does_not_continue_the_one_before(tmp_path, change, kept, row):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(change(checked_log(path))))
    steps, said = opened(path)
    assert steps == list(range(kept))
    (text,) = said
    assert re.search(
        rf"metrics\.jsonl: row {row} is damaged: expected .*crc32.*, found .*bytes from there on dropped",
        text,
    )
    assert [each["step"] for each in read_rows(path, 0)[0]] == steps


def test_a_log_from_before_there_were_checksums_goes_on_with_them_and_what_went_before_is_covered(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "loss": 0.5}\n{"step": 1, "loss": 0.25}\n')
    log = JsonLines(path, sums=True)
    log.append({"step": 2})
    log.close()
    assert opened(path) == ([0, 1, 2], [])
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.75"))
    steps, (said,) = opened(path)
    assert steps == [0, 1]
    assert "row 3 is damaged" in said


def test_a_log_is_read_on_from_any_row_and_verified_from_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = checked_log(path)
    for count in range(5):
        offset = sum(map(len, lines[:count]))
        rows, end = read_rows(path, offset)
        assert [row["step"] for row in rows] == list(range(count, 4))
        assert end == sum(map(len, lines))
    path.write_bytes(b"".join([lines[0], lines[1], lines[3]]))
    assert read_rows(path, len(lines[0]) + len(lines[1]))[0] == []


def test_a_sealed_record_comes_back_and_every_bit_of_it_counts(tmp_path):
    path, record = tmp_path / "config.json", {"schema_version": 2, "b": [0.1 + 0.2, None], "a": "x"}
    data = seal(record)
    assert unseal(path, data) == record
    assert json.loads(data).keys() == {*record, "record_sha256"}
    for place in range(8 * len(data)):
        other = bytearray(data)
        other[place // 8] ^= 1 << place % 8
        with pytest.raises(Damaged, match=r"config\.json: damaged: expected .*, found "):
            unseal(path, bytes(other))


def test_a_record_from_before_there_were_checksums_is_read_and_a_later_one_without_is_not(tmp_path):
    path = tmp_path / "config.json"
    for record in ({"schema_version": 1, "a": 2}, {"a": 2}):
        assert unseal(path, dump_json(record)) == record
    with pytest.raises(Damaged, match="expected record_sha256, the checksum of its content, found none"):
        unseal(path, dump_json({"schema_version": 2, "a": 2}))
