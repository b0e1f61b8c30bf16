"""Row 46 of the faults: files and options that hold anything.

Damage is done by what is in a file: its records lose, double, rename and retype fields, its rows and bytes are cut,
turned and swapped, checksums and lengths made anew or not. Whatever it is, a command ends in time with a status and a
sentence, and what only reads changes nothing. What a search found is an example of the test by that name.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("tyro")
from planted_runs import planted_runs
from safetensors.torch import save
from toy_stack import JOB, contents, without_checksums

from fastent import Moments, PowerLaw, SpectralEntropyMonitor, plan
from fastent.cli import main
from fastent.grokking.experiments import report
from fastent.grokking.experiments.data import pack, read_runs
from fastent.grokking.mathematics import table
from fastent.grokking.train import estimate, sweep
from fastent.grokking.train.runs import plan_stacks
from fastent.grokking.train.storage import RunError, seal
from fastent.grokking.train.sweep import run_jobs
from fastent.records import EntropyRecord

SECONDS = 10
"""Of a case, which takes a tenth of one."""


class Hang(BaseException):
    """What no handler of errors takes for one."""


@contextlib.contextmanager
def in_time():
    def ring(number, frame):
        raise Hang(f"no end after {SECONDS} s of computing, or {10 * SECONDS} s")

    clocks = {
        signal.SIGPROF: (signal.ITIMER_PROF, SECONDS),
        signal.SIGALRM: (signal.ITIMER_REAL, 10 * SECONDS),
    }
    before = {number: signal.signal(number, ring) for number in clocks}
    for clock, seconds in clocks.values():
        signal.setitimer(clock, seconds)
    try:
        yield
    finally:
        for clock, _ in clocks.values():
            signal.setitimer(clock, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


MANY, DRAWN = 3_000, 100
few_and_many = pytest.mark.parametrize("cases", [8, pytest.param(MANY, marks=pytest.mark.nightly)])


def search(cases, strategy, survives, found=()):
    """Call `survives` with what is known and so many new cases; return how many there were."""
    tried = 0

    def each(case):
        nonlocal tried
        tried += 1
        with in_time():
            survives(case)

    test = given(strategy)(each)
    for case in found:
        test = example(case)(test)
    settings(
        max_examples=cases,
        derandomize=cases < DRAWN,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )(test)()
    return tried


# Damage

VALUES = st.one_of(
    st.sampled_from(
        (
            *(None, True, False, 0, 1, -1, 7, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 10**400),
            *(0.0, -0.0, 0.5, -1.5, 1e300, 5e-324, math.nan, math.inf, -math.inf),
            *(
                "",
                "x",
                "0",
                "ok",
                "nan",
                "nonfinite",
                "add",
                "s5",
                "e7",
                "+",
                "\0",
                "\ud800",
                "a\nb",
                "../..",
                "/",
            ),
            *([], [[]], [0], [2**70], ["x", None], {}, {"a": 1}, {"": {}}, 10**12),
        )
    ),
    st.integers(-3, 100),
    st.floats(),
    st.text(max_size=4),
)
CHANGES = ("set", "drop", "rename", "wrap", "nest", "swap", "double")


@dataclass(frozen=True)
class Damage:
    """What is done to a record: a change, at the place of a number or a name of fields with dots, with a value."""

    change: str
    place: int | str
    value: Any = None

    def of_record(self, record):
        """Return `record` with the change, itself if it has no such place."""
        record = json.loads(json.dumps(record))
        places = [*_places(record)]
        if not places:
            return record
        if isinstance(self.place, str):
            wanted = self.place.split(".")
            places = [each for each in places if [str(name) for name in each[2]] == wanted]
            if not places:
                return record
        inner, name, _ = places[self.place % len(places) if isinstance(self.place, int) else 0]
        other, key, _ = places[(self.place * 31 + 7) % len(places) if isinstance(self.place, int) else 0]
        match self.change:
            case "set":
                inner[name] = self.value
            case "drop":
                del inner[name]
            case "rename" if isinstance(inner, dict):
                inner[str(self.value)] = inner.pop(name)
            case "wrap":
                inner[name] = [inner[name]]
            case "nest":
                for _ in range(40 if isinstance(self.value, int) else 900):
                    inner[name] = [inner[name]]
            case "swap":
                one, two = inner[name], other[key]
                if not isinstance(one, dict | list) and not isinstance(two, dict | list):
                    inner[name], other[key] = two, one
            case "double" if isinstance(inner, list):
                inner.insert(name, inner[name])
        return record


def _places(record, path=()):
    for name, value in record.items() if isinstance(record, dict) else enumerate(record):
        yield record, name, (*path, name)
        if isinstance(value, dict | list):
            yield from _places(value, (*path, name))


records = st.builds(Damage, st.sampled_from(CHANGES), st.integers(0, 1 << 16), VALUES)


def as_text(record):
    with contextlib.suppress(RecursionError):
        return json.dumps(record)
    return '{"a": ' + "[" * 5_000 + "]" * 5_000 + "}"


def as_json(record, sealed):
    if sealed:
        with contextlib.suppress(ValueError, RecursionError):  # what was never written cannot be sealed
            return seal({name: value for name, value in record.items() if name != "record_sha256"})
    return as_text(record).encode()


def as_log(rows, chained):
    lines, total = [], 0
    for row in rows:
        body = as_text({name: value for name, value in row.items() if name != "crc32"})[:-1].encode()
        total = zlib.crc32(body, total)
        lines.append(body + (b', "crc32": "%08x"}\n' % total if chained else b"}\n"))
    return b"".join(lines)


PIECES = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"\n",
    b"\n\n",
    b"{}",
    b"[]\n",
    b"null",
    b"NaN",
    b"1" * 5_000,
    b"\xef\xbb\xbf",
)
BYTES = ("cut", "flip", "insert", "remove", "replace", "repeat")


@dataclass(frozen=True)
class Bytes:
    """What is done to bytes, at a share of their length."""

    change: str
    at: float
    piece: bytes = b""

    def of(self, data):
        place = int(self.at * len(data))
        match self.change:
            case "cut":
                return data[:place]
            case "flip" if data:
                place = min(place, len(data) - 1)
                return data[:place] + bytes([data[place] ^ 1 << len(self.piece) % 8]) + data[place + 1 :]
            case "insert":
                return data[:place] + self.piece + data[place:]
            case "remove":
                return data[:place] + data[place + 1 + len(self.piece) :]
            case "repeat":
                return data[:place] + data
        return self.piece


raw = st.builds(
    Bytes, st.sampled_from(BYTES), st.floats(0, 1), st.sampled_from(PIECES) | st.binary(max_size=12)
)


# Folders of runs

FORMS = ("complete", "half", "failed", "complete, unchecked", "half, unchecked")
FILES = (
    *("config.json", "environment.json", "metrics.jsonl", "timing.jsonl", "DONE", "FAILED", "lock"),
    *("newest.json", "newest.safetensors", "sweep.json", "packed.parquet"),
)
PLACES = (
    *("gone", "folder", "link", "loop", "pipe", "two names"),
    *("of another step", "of another run", "of another kind"),
)


@dataclass(frozen=True)
class Case:
    """One file of one of three runs, and what is done to it; a list of changes of a record, of bytes, or of places.

    `sealed` makes checksums anew, so that what is read is the damage and not its trace. `reader` is the number of the
    command that reads it.
    """

    form: str
    file: str
    damage: Any
    row: int = 0
    sealed: bool = True
    reader: int = 0


folders = st.builds(
    Case,
    st.sampled_from(FORMS),
    st.sampled_from(FILES),
    st.one_of(records, records, raw, st.sampled_from(PLACES)),
    st.integers(0, 40),
    st.booleans(),
    st.integers(0, 7),
)


@pytest.fixture
def forms(toy, half, tmp_path, uninterrupted):
    """The files of folders in each form, by name."""
    pack(read_runs(tmp_path / "uninterrupted"), tmp_path / "packed")
    (packed,) = (tmp_path / "packed").iterdir()
    found = {}
    for form in FORMS:
        out = tmp_path / f"form {form}"
        shutil.copytree(tmp_path / "uninterrupted" if "complete" in form else half(27, form), out)
        runs = sorted(out.iterdir())
        for run in runs:
            if form == "failed":
                said = {
                    "schema_version": 2,
                    "attempts": 2,
                    "reason": "killed",
                    "lines": ["a"],
                    "command": "b",
                }
                (run / "FAILED").write_bytes(seal(said))
            if "unchecked" in form:
                without_checksums(run)
            if "half" in form:
                (run / "lock").write_text(json.dumps({"pid": 2**22 + 1, "host": "elsewhere"}))
        limits = {"e1-baseline-add-seed7": 60}
        sweep = {"pid": os.getppid(), "host": os.uname().nodename, "limits": limits}
        (out / "sweep-here-1.json").write_text(json.dumps(sweep))
        found[form] = {
            str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
        }
        found[form]["packed.parquet"] = packed.read_bytes()
    return found


def lay(out, files):
    shutil.rmtree(out, ignore_errors=True)
    for name, data in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def damaged(case, out, files):
    """Lay out a folder and damage it; return the path that was damaged."""
    run = JOB.run_name(1)
    lay(out, {name: data for name, data in files.items() if name != "packed.parquet"})
    newest = max((name for name in files if name.startswith(f"{run}/checkpoint-")), default="").partition(
        "."
    )[0]
    name = {"sweep.json": "sweep-here-1.json", "packed.parquet": "packed.parquet"}.get(case.file)
    if name is None:
        name = newest + case.file.removeprefix("newest") if "newest" in case.file else f"{run}/{case.file}"
    if case.file == "packed.parquet":
        (out / name).write_bytes(files[name])
    path = out / name
    data = path.read_bytes() if path.exists() else b'{"schema_version": 2}'
    if isinstance(case.damage, Bytes):
        path.write_bytes(case.damage.of(data))
    elif isinstance(case.damage, Damage):
        path.write_bytes(changed(case, path, data))
        if path.suffix == ".safetensors" and case.sealed:
            record = path.with_suffix(".json")
            sums = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            record.write_bytes(as_json(json.loads(record.read_bytes()) | sums, sealed=True))
    else:
        displaced(case, out, path, data)
    return path


def changed(case, path, data):
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in data.splitlines()]
        at = case.row % len(rows)
        change, value = case.damage.change, case.damage.value
        if change == "double" and value is None:
            rows.insert(at, rows[at])
        elif change == "drop" and value is None:
            del rows[at]
        elif change == "swap" and value is None:
            rows[at], rows[0] = rows[0], rows[at]
        else:
            rows[at] = case.damage.of_record(rows[at])
        return as_log(rows, chained=case.sealed)
    if path.suffix == ".safetensors":
        return header_changed(case.damage, data)
    if path.suffix == ".parquet":
        return parquet_changed(case, data)
    return as_json(case.damage.of_record(json.loads(data)), case.sealed and b"record_sha256" in data)


def header_changed(damage, data):
    (length,) = struct.unpack("<Q", data[:8])
    head = as_text(damage.of_record(json.loads(data[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


def parquet_changed(case, data):
    """Change a cell, a column or what is in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(data))
    head = json.loads(table.schema.metadata[b"fastent"])
    if case.row % 2:
        head = case.damage.of_record(head)
    else:
        columns = case.damage.of_record(table.to_pydict())
        with contextlib.suppress(Exception):  # not every value has a place in a table
            table = pa.table(columns)
    head = {**head, "schema_version": 1} if case.sealed and isinstance(head, dict) else head
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"fastent": as_text(head).encode()}), file)
    return file.getvalue()


def displaced(case, out, path, data):
    if case.damage == "two names" and path.exists():
        os.link(path, out / "another name")
        return
    if path.exists():
        path.unlink()
    match case.damage:
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to("nowhere")
        case "loop":
            path.symlink_to(path.name)
        case "pipe":
            os.mkfifo(path)
        case "of another step":
            path.with_name(re.sub(r"\d+", "999999999999", path.name)).write_bytes(data)
        case "of another run":
            other = path.parent.with_name(JOB.run_name(0)) / path.name
            if other.exists():
                path.write_bytes(other.read_bytes())
        case "of another kind":
            others = [each for each in out.rglob("*") if each.is_file() and each.name != path.name]
            path.write_bytes(random.Random(case.row).choice(sorted(others)).read_bytes())


def tree(out):
    """Everything below `out`: links as links, what is no file by its kind."""
    return {
        str(path.relative_to(out)): os.readlink(path)
        if path.is_symlink()
        else (path.read_bytes() if path.is_file() else path.stat().st_mode)
        for path in sorted(out.rglob("*"))
    }


def but_marks(files):
    """Leave out what a run that is refused has of its own: its mark of a failure, and the lock that it gives back."""
    return {name: data for name, data in files.items() if not name.endswith(("FAILED", "lock"))}


def spoken(line):
    """Call the command line; return its status and what it printed."""
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            status = main(line)
        except SystemExit as ended:  # of the parser
            status = ended.code
    assert status in (0, 1, 2), line
    assert "Traceback" not in printed.getvalue() + said.getvalue(), said.getvalue()
    return status, printed.getvalue(), said.getvalue()


@pytest.fixture
def read_alone(monkeypatch):
    """Commands without what they time, draw or compute for seconds or minutes once everything is read."""
    monkeypatch.setattr(report, "save", lambda pictures, folder: None)
    monkeypatch.setattr(estimate, "trial", lambda *_: estimate.Speed(1e-3, 1e-3, 1e-3, recorded=False))
    monkeypatch.setattr(plan, "measure_rates", lambda: plan.Rates(1e-5, 1e10, [(8, 1e9)], [(8, 1e-5)]))
    monkeypatch.setattr(table, "print_table", lambda runs: 0)


def no_constant(name):
    raise AssertionError(f"{name} in JSON")


SETTINGS = (
    *("--width", "4", "--heads", "1", "--evaluate-every", "5", "--max-steps", "60", "--preset", "paper"),
    *("--run-past-steps", "0", "--run-past-share", "0.5", "--batch-size", "1"),
)


def readings(out, other):
    """Everything that reads a folder of runs, as command lines."""
    return (
        ["runs", out, "--json"],
        ["verify", out, "--json"],
        ["verify", out],
        ["watch", out, "--once"],
        ["compare", out],
        ["report", out, "--out", other],
        ["check", "maths", "--runs", out],
        ["run", "e1", "--dry-run", *SETTINGS, "--out", out],
    )


@few_and_many
def test_a_damaged_run_is_read_without_a_traceback_and_nothing_changes(
    cases, forms, read_alone, tmp_path, figure
):
    out = tmp_path / "runs"

    def survives(case):
        path = damaged(case, out, forms[case.form])
        before = tree(out)
        line = readings(str(out), str(tmp_path / "report"))[case.reader]
        status, printed, said = spoken(line)
        if "--json" in line and printed:
            json.loads(printed, parse_constant=no_constant)
        if line[0] == "verify" and status:
            assert str(path.parent) in printed + said
        assert tree(out) == before

    figure(46, "files of runs that are read", *2 * (search(cases, folders, survives, RUNS_FOUND),))


RUNS_FOUND = (
    Case("half", "config.json", Damage("set", "config.evaluate_every", 0), reader=1),
    Case("half, unchecked", "config.json", Damage("set", "config.evaluate_every", 0), reader=7),
    Case("half, unchecked", "config.json", Damage("drop", "config.evaluate_every"), reader=1),
    Case("half, unchecked", "config.json", Damage("drop", "config.max_steps"), reader=2),
    Case("complete", "config.json", Damage("rename", "config.width", "x"), reader=1),
)


@few_and_many
def test_a_damaged_run_goes_on_to_the_end_or_is_refused_as_it_is(
    cases, forms, toy, tmp_path, uninterrupted, figure, capsys
):
    out = tmp_path / "runs"

    def survives(case):
        damaged(case, out, forms[case.form])
        before = tree(out)
        capsys.readouterr()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes = run_jobs(plan_stacks(JOB, out), out)
        except (RunError, OSError, ValueError, TypeError) as error:
            refused, seeds = [str(error)], JOB.seeds
        else:
            ended = [outcome for outcome in outcomes if outcome.error is not None]
            refused = [outcome.error for outcome in ended]
            # Another stack of the job trains all the same.
            seeds = [seed for outcome in ended for seed in outcome.job.seeds]
        assert "Traceback" not in capsys.readouterr().err
        assert not [*out.rglob("*.tmp")]
        assert all(str(out) in said for said in refused)
        others = {JOB.run_name(seed) for seed in set(JOB.seeds).difference(seeds)}
        now, was = (
            {name: data for name, data in but_marks(found).items() if name.partition("/")[0] not in others}
            for found in (tree(out), before)
        )
        assert not refused or now == was
        if not case.sealed and case.form in ("half", "failed") and case.damage not in PLACES:
            ends = contents(out)
            for name in uninterrupted:
                assert name.partition("/")[0] not in others or ends[name] == uninterrupted[name]

    figure(46, "files of runs that go on", *2 * (search(cases, folders, survives, RESUMED_FOUND),))


RESUMED_FOUND = (
    Case("half, unchecked", "config.json", Damage("set", "config.evaluate_every", 0)),
    Case("half", "timing.jsonl", "link", sealed=False),
    Case("half", "timing.jsonl", "two names", sealed=False),
    Case("half, unchecked", "FAILED", "folder", sealed=False),
    Case("complete, unchecked", "config.json", Damage("set", "stack.0", 9), sealed=False),
    Case("complete, unchecked", "config.json", Damage("set", "stack", [9, 1]), sealed=False),
    Case("half, unchecked", "config.json", Damage("set", "stack", [9, 1]), sealed=False),
    # Its width and a seed of its stack.
    Case("half, unchecked", "config.json", Damage("swap", 139), sealed=False),
)


@pytest.mark.parametrize("cases", [1, pytest.param(DRAWN, marks=pytest.mark.nightly)])
def test_a_report_on_a_damaged_run_is_drawn_or_the_run_is_named(cases, forms, tmp_path, figure):
    out, page = tmp_path / "runs", tmp_path / "report" / "index.html"

    def survives(case):
        path = damaged(case, out, forms[case.form])
        before = tree(out)
        shutil.rmtree(page.parent, ignore_errors=True)
        status, _, said = spoken(["report", str(out), "--out", str(page.parent)])
        assert page.exists() == (status == 0)
        assert status == 0 or str(out) in said, (path, said)
        assert tree(out) == before

    measured = folders.filter(lambda case: case.file in ("metrics.jsonl", "packed.parquet") and case.sealed)
    figure(46, "reports that are drawn", *2 * (search(cases, measured, survives),))


# Documents that a report is written into

PARTS = (
    *("<!-- fastent report: summary -->", "<!-- fastent report: claims -->", "<!-- fastent report: e9 -->"),
    *("<!-- fastent report: end -->", "<!-- fastent report of runs -->", "<!-- fastent report of ../.. -->"),
    *("<!-- fastent report: ", "-->", "<!--", "\n", "\r\n", "\0", "\ufeff", "\udcff", "```\n"),
)
DOCUMENT = f"# A\n{PARTS[0]}\nqwxz\n{PARTS[3]}\nbetween\n{PARTS[1]}\n{PARTS[3]}\nend\n"
documents = st.lists(st.sampled_from(PARTS) | st.text(max_size=6), max_size=9).map(
    lambda parts: "".join(parts).encode(errors="surrogatepass")
) | raw.map(lambda damage: damage.of(DOCUMENT.encode()))


@few_and_many
def test_a_damaged_document_takes_in_the_report_or_is_named_and_left_as_it_is(
    cases, uninterrupted, tmp_path, monkeypatch, figure
):
    runs = tmp_path / "uninterrupted"
    sections = report.make_sections(runs)
    monkeypatch.setattr(report, "make_sections", lambda *_: sections)
    path = tmp_path / "document.md"

    def survives(data):
        path.write_bytes(data)
        checked, _, said = spoken(["report", str(runs), "--check", str(path)])
        assert checked == 0 or not said or str(path) in said
        assert path.read_bytes() == data
        filled, _, said = spoken(["report", str(runs), "--fill", str(path)])
        if filled:
            assert str(path) in said
            assert path.read_bytes() == data
        else:
            assert spoken(["report", str(runs), "--check", str(path)])[0] == 0
            assert b"qwxz" not in path.read_bytes()

    figure(46, "documents of a report", *2 * (search(cases, documents, survives, (DOCUMENT.encode(),)),))


# Files of activations

ARRAYS = {
    "float32.npy": np.arange(24, dtype=np.float32).reshape(8, 3) ** 2,
    "tokens.npy": np.arange(48, dtype=np.float64).reshape(8, 2, 3) ** 2,
    "half.npz": np.arange(24, dtype=np.float16).reshape(8, 3) ** 2,
    "bfloat16.safetensors": np.arange(24).reshape(8, 3) ** 2,
}


def stored(name):
    array, file = ARRAYS[name], io.BytesIO()
    if name.endswith(".safetensors"):
        return save({"h": torch.from_numpy(array).to(torch.bfloat16)})
    np.savez(file, h=array) if name.endswith(".npz") else np.save(file, array)
    return file.getvalue()


HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "descr": st.sampled_from(
            ("<f4", ">f8", "<f2", "|O", "<U3", "|V2", "<c16", "|b1", "<i8", "<M8[s]", "x", 7)
        ),
        "shape": st.lists(
            st.integers(-2, 9) | st.sampled_from((0, 1, 2**31, 2**62, 2**64, 10**30)), max_size=4
        ),
        "fortran_order": st.sampled_from((True, False, 3, None)),
        "more": st.just(1),
    },
)


def npy(header, data):
    """A NumPy file of any header."""
    start = {"descr": "<f4", "fortran_order": False, "shape": [8, 3], **header}
    text = repr({name: tuple(value) if name == "shape" else value for name, value in start.items()}) + "\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode() + data


def zipped(data, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("h.npy", data)
    return file.getvalue()


ASKED = st.sampled_from(((), ("--tokens", "flatten"), ("--convention", "paper")))
activations = st.one_of(
    st.tuples(st.sampled_from([*ARRAYS]), raw | records, ASKED),
    st.tuples(st.sampled_from(("header.npy", "header.npz")), HEADERS, ASKED),
)


@few_and_many
def test_a_damaged_file_of_activations_is_named_in_a_sentence(cases, tmp_path, figure):
    def survives(case):
        name, damage, options = case
        path = tmp_path / name
        if isinstance(damage, dict):
            data = npy(damage, bytes(96))
            path.write_bytes(data if name.endswith(".npy") else zipped(data))
        elif isinstance(damage, Damage):
            data = stored(name)
            path.write_bytes(header_changed(damage, data) if name.endswith(".safetensors") else data)
        elif isinstance(damage, int):  # a way to compress that NumPy does not write
            path.write_bytes(zipped(stored("float32.npy"), damage))
        else:
            path.write_bytes(damage.of(stored(name)))
        before = path.read_bytes()
        status, _, said = spoken(["entropy", str(path), *options])
        assert status == 0 or name in said or not said
        assert path.read_bytes() == before

    figure(46, "files of activations", *2 * (search(cases, activations, survives, ACTIVATIONS_FOUND),))


ACTIVATIONS_FOUND = (
    ("float32.npy", Bytes("remove", 0.2485, b"1234567"), ()),  # a TokenError of NumPy's
    ("half.npz", Bytes("insert", 0.984, b"\n\n"), ()),  # an OSError without the file
    ("header.npz", {"shape": [10**30, 0]}, ()),
    ("header.npz", {"shape": [2**31, 2**31]}, ()),
    ("lzma.npz", zipfile.ZIP_LZMA, ()),
)


# States and records that Python reads


def watched(steps=12):
    monitor = SpectralEntropyMonitor(threshold=0.9)
    for step in range(steps):
        h = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        for layer in ("a", "b"):
            monitor.observe(step, h, layer=layer)
    monitor.flush()
    return monitor


@few_and_many
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_state_of_a_monitor_is_refused_and_nothing_is_loaded(cases, figure):
    state, monitor = watched().state_dict(), watched(3)

    def survives(damage):
        before, other = monitor.state_dict(), SpectralEntropyMonitor(threshold=0.9)
        try:
            other.load_state_dict(damage.of_record(state))
        except ValueError:
            with pytest.raises(ValueError, match=r"^nothing is loaded: "):
                monitor.load_state_dict(damage.of_record(state))
            assert monitor.state_dict() == before
            return
        other.load_state_dict(other.state_dict())  # what was taken can be saved and taken again
        with contextlib.suppress(ValueError):  # of another step or width than recorded
            other.observe(2**40, torch.randn(16, 4), layer="a")
            other.flush()
        other.should_stop()
        repr(other)
        json.dumps(other.state_dict(), allow_nan=False)

    figure(46, "states of a monitor", *2 * (search(4 * cases, records, survives, STATES_FOUND),))


STATES_FOUND = (Damage("nest", "version"), Damage("set", "history.mask.0", [["x"]]))


@few_and_many
def test_damaged_records_laws_and_moments_are_refused_with_a_documented_error(cases, figure):
    record = watched(1).history[0].as_dict()
    law = PowerLaw.fit(planted_runs(4)).as_dict()
    moments = Moments().update(torch.eye(4))
    state = {**moments.state_dict(), "packed": moments.pack().tolist()}

    def survives(damage):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            repr(EntropyRecord.from_dict(damage.of_record(record)))
        with contextlib.suppress(ValueError):
            read = PowerLaw.from_dict(damage.of_record(law))
            assert str(read)
            assert read.note is not None
            json.dumps(read.as_dict())
        values = damage.of_record(state)
        with contextlib.suppress(KeyError, ValueError, TypeError, RuntimeError, OverflowError):
            values["packed"] = torch.tensor(values["packed"], dtype=torch.float64)
        other = Moments()
        try:
            other.load_state_dict(values)
        except (ValueError, TypeError, KeyError):
            assert other == Moments()
        else:
            if other.n > 1:
                other.spectral_entropy()

    figure(46, "records, laws and moments", *2 * (search(4 * cases, records, survives, RECORDS_FOUND),))


RECORDS_FOUND = (
    Damage("wrap", "c1"),
    Damage("set", "intervals", 1),
    Damage("wrap", "n_runs"),
    Damage("set", "n_points", None),
    Damage("wrap", "folds.0.0"),
    Damage("set", "total_variance", 10**400),
    Damage("nest", "status", "x"),
    Damage("wrap", "mask"),
    Damage("set", "packed.12", math.nan),
)


# Options

WORDS = st.sampled_from(
    (
        *("0", "1", "2", "-1", "3", "64", "1e3", "0.5", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 5_000),
        *(
            "",
            " ",
            ",",
            "1,2",
            "1,1",
            "1,x",
            "0-2",
            "2-0",
            "0-99999999",
            "1-",
            "-",
            "--",
            "x",
            "é",
            "\ud800",
            "a b",
        ),
        *(
            "cpu",
            "cuda:9",
            "meta",
            "add",
            "s5",
            "mlp",
            "transformer",
            "quick",
            "paper",
            "all",
            "own",
            "e1",
            "e7",
        ),
        *(
            "baseline",
            "losses-0.2",
            "losses-",
            "norm-as-baseline",
            "fourier",
            "ray",
            "pool",
            "inline",
            "True",
            "None",
        ),
        *(
            ".",
            "nowhere",
            "file",
            "/",
            "/dev/null",
            "empty",
            "flat.npy",
            "runs",
            "last",
            "a" * 300,
            "\0",
            "*",
            "~",
        ),
    )
)
COMMANDS = ("run", "report", "runs", "watch", "verify", "compare", "entropy", "list", "check", "plan")


def options_of(command):
    """Read the options of a command from its own help."""
    text = spoken([command, "--help"])[1]
    return sorted(set(re.findall(r"--[a-z][a-z-]*", text)) - {"--help"})


@pytest.fixture
def tried_here(tmp_path, monkeypatch, read_alone):
    """A folder with something of each kind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    np.save(tmp_path / "flat.npy", np.ones(5))
    monkeypatch.setattr(sweep, "run_jobs", None)
    return tmp_path


lines = st.tuples(
    st.sampled_from(COMMANDS),
    st.lists(WORDS, max_size=2),
    st.lists(st.tuples(st.integers(0, 200), st.none() | WORDS, st.booleans()), max_size=4),
)


@few_and_many
def test_any_options_end_in_a_status_and_a_sentence_and_leave_nothing(cases, tried_here, figure):
    known = {command: options_of(command) for command in COMMANDS}

    def survives(case):
        command, words, options = case
        line = [command, *words]
        for number, value, joined in options:
            option = known[command][number % len(known[command])] if known[command] else "--x"
            line += [option] if value is None else [f"{option}={value}"] if joined else [option, value]
        before = tree(tried_here)
        status, _, said = spoken([*line, "--dry-run"] if command == "run" else line)
        assert status == 0 or len(said) > 20
        assert tree(tried_here) == before

    figure(46, "command lines", *2 * (search(cases, lines, survives, LINES_FOUND),))


LINES_FOUND = ()
