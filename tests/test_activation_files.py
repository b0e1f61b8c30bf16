"""Activations from files, each against the function on the array that was saved."""

import pickle
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("safetensors")
from safetensors.torch import save_file

from fastent import cli, spectral_entropy
from fastent.cli import entropy_of_file, main

H = np.random.default_rng(0).normal(size=(60, 8)) * np.arange(1, 9)


def saved(folder, array, form):
    path = folder / f"h.{form.split()[0]}"
    if form == "safetensors":
        save_file({"h": torch.from_numpy(np.ascontiguousarray(array))}, path)
    elif form == "npz":
        np.savez(path, array)
    elif form == "npz compressed":
        np.savez_compressed(path, h=array)
    else:
        np.save(path, np.asfortranarray(array) if "columns" in form else array)
    return path


FORMS = ["npy", "npy columns first", "npz", "npz compressed", "safetensors"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [None, 200, 1000])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int32"])
def test_a_file_has_the_entropy_of_its_array_read_whole_or_in_chunks_of_rows(
    tmp_path, monkeypatch, form, chunk, dtype
):
    array = (10 * H).astype(dtype)
    path = saved(tmp_path, array, form)
    if chunk is not None:
        monkeypatch.setattr(cli, "WHOLE_BYTES", 0)
        monkeypatch.setattr(cli, "CHUNK_BYTES", chunk)
    found, named = entropy_of_file(path)
    expected = spectral_entropy(torch.from_numpy(array))
    assert found.normalized == pytest.approx(expected.normalized, abs=1e-13)
    assert (found.n, found.d, found.status, named) == (60, 8, expected.status, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", ["flatten", "first", "last", "mean", "skip_first"])
def test_a_tokens_axis_is_read_as_asked_in_chunks_too(tmp_path, monkeypatch, form, tokens):
    array = np.random.default_rng(1).normal(size=(40, 3, 5))
    path = saved(tmp_path, array, form)
    expected = spectral_entropy(torch.from_numpy(array), tokens=tokens)
    for whole in (1 << 20, 0):
        monkeypatch.setattr(cli, "WHOLE_BYTES", whole)
        monkeypatch.setattr(cli, "CHUNK_BYTES", 500)
        found, _ = entropy_of_file(path, tokens=tokens)
        assert (found.normalized, found.n) == (pytest.approx(expected.normalized, abs=1e-13), expected.n)


@pytest.mark.parametrize("form", FORMS)
def test_fewer_rows_than_features_are_limited_by_their_rank_also_where_they_are_mapped(
    tmp_path, monkeypatch, form
):
    monkeypatch.setattr(cli, "WHOLE_BYTES", 0)
    found, _ = entropy_of_file(saved(tmp_path, H.T.copy(), form))
    expected = spectral_entropy(torch.from_numpy(H.T.copy()))
    assert (found.status.value, found.normalized) == (
        "rank_limited",
        pytest.approx(expected.normalized, abs=1e-13),
    )


@pytest.mark.parametrize("whole", [1 << 20, 0])
def test_bfloat16_is_read_from_two_byte_void_and_from_safetensors_and_named(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(cli, "WHOLE_BYTES", whole)
    h = torch.from_numpy(H).bfloat16()
    expected = spectral_entropy(h)
    np.save(tmp_path / "h.npy", h.view(torch.uint16).numpy().view("V2"))
    save_file({"h": h}, tmp_path / "h.safetensors")
    for name, said in (("h.npy", "bfloat16 (two-byte void in the file)"), ("h.safetensors", "bfloat16")):
        found, named = entropy_of_file(tmp_path / name)
        assert (found.normalized, found.status, named) == (
            pytest.approx(expected.normalized, abs=1e-13),
            expected.status,
            said,
        )


@pytest.mark.parametrize("order", [">", "<"])
def test_bytes_of_either_order_are_read(tmp_path, monkeypatch, order):
    np.save(tmp_path / "h.npy", H.astype(f"{order}f8"))
    for whole in (1 << 20, 0):
        monkeypatch.setattr(cli, "WHOLE_BYTES", whole)
        found, _ = entropy_of_file(tmp_path / "h.npy")
        assert found.normalized == pytest.approx(spectral_entropy(torch.from_numpy(H)).normalized, abs=1e-13)


BOUNDED = """
import resource, sys
import numpy, torch, safetensors, scipy.linalg
from fastent import cli
cli.WHOLE_BYTES, cli.CHUNK_BYTES = 1 << 20, 1 << 22
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (96 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(cli.main(["entropy", sys.argv[1]]))
"""


@pytest.mark.parametrize("form", ["npy", "npz"])
def test_an_array_larger_than_the_memory_allowed_is_read_in_bounded_memory(tmp_path, form):
    # 256 MiB of which the disk holds little, with 96 MiB allowed beside what the imports take.
    rows, d = 1 << 19, 64
    path = tmp_path / "h.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(rows, d))
    array[:100] = H.repeat(8, 1).repeat(2, 0)[:100]
    array.flush()
    del array
    assert path.stat().st_size > 255 << 20
    if form == "npz":
        with zipfile.ZipFile(tmp_path / "h.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.write(path, "h.npy")
        path = tmp_path / "h.npz"
    done = subprocess.run([sys.executable, "-c", BOUNDED, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"samples, features    {rows}, {d}" in done.stdout


def test_one_long_sample_is_mapped_and_not_read_at_once(tmp_path, monkeypatch):
    h = np.random.default_rng(0).normal(size=(1, 20_000, 8))
    np.save(tmp_path / "h.npy", h)
    monkeypatch.setattr(cli, "WHOLE_BYTES", 0)
    monkeypatch.setattr(cli, "CHUNK_BYTES", 1 << 16)
    entropy_of_file(saved(tmp_path, H, "npz"))  # imports
    tracemalloc.start()
    try:
        found, _ = entropy_of_file(tmp_path / "h.npy", tokens="flatten")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.normalized == pytest.approx(spectral_entropy(torch.from_numpy(h[0])).normalized, abs=1e-13)
    assert peak < h.nbytes // 2


class Bomb:
    def __reduce__(self):
        return open, ("executed", "w")


def test_every_kind_of_pickle_is_refused_with_the_reason_and_nothing_in_it_runs(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    torch.save({"h": Bomb()}, "new.pt")
    torch.save({"h": Bomb()}, "new.npz")
    torch.save({"h": Bomb()}, "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(Bomb()))
    np.save("objects.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.savez("objects.npz", np.array([Bomb()], dtype=object))
    for name in ("new.pt", "new.npz", "old.pt", "bare.npy", "objects.npy", "objects.npz"):
        assert main(["entropy", name]) == 1
        error = capsys.readouterr().err
        assert name in error
        assert "pickle, and reading one runs the code in it" in error
        assert "numpy.save" in error
    assert not (tmp_path / "executed").exists()


def test_what_is_no_array_of_numbers_is_named_with_a_remedy(tmp_path):
    np.savez(tmp_path / "two.npz", a=H, b=H)
    with pytest.raises(ValueError, match=r"two\.npz holds 2 arrays \(a, b\), and it must be one"):
        entropy_of_file(tmp_path / "two.npz")
    save_file({"x": torch.ones(2), "y": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"two\.safetensors holds 2 arrays \(x, y\)"):
        entropy_of_file(tmp_path / "two.safetensors")
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    np.save(tmp_path / "void.npy", np.zeros((4, 4), "V1"))
    for name in ("text", "void"):
        with pytest.raises(
            ValueError, match=rf"{name}\.npy holds .*, which is no type of number here .* as float32"
        ):
            entropy_of_file(tmp_path / f"{name}.npy")
    (tmp_path / "table.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match=r"table\.csv is neither \.npy, \.npz nor \.safetensors"):
        entropy_of_file(tmp_path / "table.csv")
    np.save(tmp_path / "wide.npy", H.astype(np.longdouble))
    with pytest.raises(ValueError, match=r"wide\.npy holds .*, wider than torch's types: save it as float64"):
        entropy_of_file(tmp_path / "wide.npy")
    with zipfile.ZipFile(tmp_path / "notes.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"notes\.npz holds 'readme\.txt', no array: save .* numpy\.savez"):
        entropy_of_file(tmp_path / "notes.npz")
    np.save(tmp_path / "complex.npy", H + 1j)
    with pytest.raises(TypeError, match="complex"):
        entropy_of_file(tmp_path / "complex.npy")


@pytest.mark.parametrize("form", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("whole", [1 << 20, 0])
def test_a_file_cut_short_is_named(tmp_path, monkeypatch, form, whole):
    monkeypatch.setattr(cli, "WHOLE_BYTES", whole)
    path = saved(tmp_path, H, form)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=rf"h\.{form} is (cut short|not a whole)"):
        entropy_of_file(path)


@pytest.mark.parametrize("length", [6, 8, 9, 10, 60, 127])
def test_a_file_cut_short_in_its_header_is_named(tmp_path, length):
    path = saved(tmp_path, H, "npy")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"h\.npy has no whole NumPy header, and is cut short or damaged"):
        entropy_of_file(path)


@pytest.mark.parametrize(
    "changes", [(b"(60, 8)", b"(-6, 8)"), (b"'<f8'", b"'<q9'"), (b"'shape'", b"'shade'")]
)
def test_a_damaged_header_is_named(tmp_path, changes):
    path = saved(tmp_path, H, "npy")
    path.write_bytes(path.read_bytes().replace(*changes))
    with pytest.raises(ValueError, match=r"h\.npy "):
        entropy_of_file(path)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((20, 3, 4), [], "say what the tokens are to be, --tokens flatten, first, last, mean or skip_first"),
        ((20, 4), ["--tokens", "mean"], "which has no tokens axis: leave out --tokens"),
        ((2, 20, 3, 4), [], "it must be (n, d), or (n, tokens, d) with --tokens; reshape it"),
        ((20,), [], "it must be (n, d), or (n, tokens, d) with --tokens"),
    ],
)
def test_messages_of_the_command_speak_of_its_options(tmp_path, capsys, shape, options, message):
    np.save(tmp_path / "h.npy", np.ones(shape))
    assert main(["entropy", str(tmp_path / "h.npy"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "batch_dims" not in error


@pytest.mark.parametrize("whole", [1 << 20, 0])
def test_nan_in_the_activations_is_exit_status_1_and_said(tmp_path, monkeypatch, capsys, whole):
    monkeypatch.setattr(cli, "WHOLE_BYTES", whole)
    np.save(tmp_path / "h.npy", np.where(np.arange(480).reshape(60, 8) == 77, np.nan, H))
    assert main(["entropy", str(tmp_path / "h.npy")]) == 1
    assert "nonfinite" in capsys.readouterr().out
