"""Activations in files: .npy, .npz of one array and .safetensors of one tensor, in chunks of rows where they are large.

An array that is larger than `WHOLE` is never in memory as a whole: its rows are read `CHUNK` bytes at a time and added
up by `fastent.Moments`. Where it has fewer rows than features, which takes the Gram matrix, or the paper's convention
is asked for, it is mapped instead, and the system reads the pages as they are needed; an .npz cannot be mapped and is
read.

Nothing here reads a pickle, because unpickling runs code: files of torch.save and arrays of objects are refused.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fastent.activations import Tokens
from fastent.entropy import Convention, SpectralEntropy, spectral_entropy
from fastent.moments import Moments

WHOLE = 1 << 28
"""Bytes of a file's array that is read as a whole."""

CHUNK = 1 << 25
"""Bytes of the rows that are read at a time from a larger one."""

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin")


@dataclass(frozen=True)
class Stored:
    """An array in a file.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
        As the file names it, with how it is read where that says too little.
    nbytes : int
    rows : function of a number of rows
        Reads the array anew, as tensors of so many rows at a time.
    whole : function
        The array as one tensor, mapped where the file allows.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    rows: Callable[[int], Iterator[Tensor]]
    whole: Callable[[], Tensor]


def entropy_of_file(
    path: Path, *, tokens: Tokens | None = None, convention: Convention = "relative"
) -> tuple[SpectralEntropy, str]:
    """Entropy of the activations in a file, and the dtype that it holds.

    Parameters
    ----------
    path : Path
        A .npy, .npz or .safetensors file of one array, (n, d) or (n, tokens, d).
    tokens : {"flatten", "first", "last", "mean", "skip_first"}, optional
        What to make of a tokens axis.
    convention : {"relative", "paper"}
        See `fastent.spectral_entropy`.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError, TypeError
        If it holds something else: what, and how to save it; or its shape leaves a choice open.
    """
    with open_array(path) as stored:
        shape = stored.shape
        if len(shape) not in (2, 3):
            raise ValueError(
                f"{path} holds shape {shape}: it must be (n, d), or (n, tokens, d) with --tokens; reshape it and save "
                "it again"
            )
        if len(shape) == 3 and tokens is None:
            raise ValueError(
                f"{path} holds shape {shape}, read as (n, tokens, d): say what the tokens are to be, --tokens flatten, "
                "first, last, mean or skip_first"
            )
        if len(shape) == 2 and tokens is not None:
            raise ValueError(f"{path} holds shape {shape}, which has no tokens axis: leave out --tokens")
        n = shape[0] * (shape[1] if tokens == "flatten" and len(shape) == 3 else 1)
        # One sample may be more than there is memory for: mapped, its tokens are read as they are needed.
        long = stored.nbytes > CHUNK * shape[0]
        if stored.nbytes <= WHOLE or n < shape[-1] or convention == "paper" or long:
            return spectral_entropy(stored.whole(), tokens=tokens, convention=convention), stored.dtype
        moments = Moments()
        for rows in stored.rows(max(1, CHUNK * shape[0] // stored.nbytes)):
            moments.update(rows, tokens=tokens)
        return moments.spectral_entropy(), stored.dtype


@contextlib.contextmanager
def open_array(path: Path) -> Iterator[Stored]:
    """Open the one array of a file, by its first bytes and its name.

    Raises
    ------
    OSError, ValueError
        As `entropy_of_file`.
    """
    try:
        with _opened(path) as stored:
            yield stored
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Stored]:
    with open(path, "rb") as file:
        start = file.read(8)
    if path.suffix == ".safetensors":
        with _safetensors(path) as stored:
            yield stored
    elif start.startswith(b"\x93NUMPY"):
        yield _numpy(path, functools.partial(_file, path), mapped=True)
    elif start.startswith(b"PK") and path.suffix not in PICKLES:
        yield _numpy(path, functools.partial(_member, path, _only_member(path)), mapped=False)
    elif path.suffix in PICKLES or start.startswith(b"\x80"):
        raise ValueError(
            f"{path} is a pickle, and reading one runs the code in it: load it where you trust it, and save the "
            "activations with numpy.save or safetensors.torch.save_file"
        )
    else:
        raise ValueError(
            f"{path} is neither .npy, .npz nor .safetensors: save the activations with numpy.save"
        )


def _only_member(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith(".pkl") for name in names):
        raise ValueError(
            f"{path} is a file of torch.save, a pickle, and reading one runs the code in it: save the activations with "
            "numpy.save or safetensors.torch.save_file"
        )
    _check_one(path, [name.removesuffix(".npy") for name in names])
    if not names[0].endswith(".npy"):
        raise ValueError(
            f"{path} holds {names[0]!r}, no array: save the activations with numpy.savez or numpy.save"
        )
    return names[0]


@contextlib.contextmanager
def _file(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "rb") as file:
        yield file


@contextlib.contextmanager
def _member(path: Path, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(name) as file:
        yield file


def _check_one(path: Path, names: list[str]) -> None:
    if len(names) != 1:
        raise ValueError(
            f"{path} holds {len(names)} arrays ({', '.join(sorted(names)[:10])}), and it must be one: save that one "
            "alone"
        )


def _numpy(path: Path, opened: Callable[[], AbstractContextManager[IO[bytes]]], *, mapped: bool) -> Stored:
    """Describe the array of a .npy stream, which `opened` opens anew at each call."""
    with opened() as file:
        try:
            shape, column_major, dtype = _header(file)
            if any(size < 0 for size in shape):
                raise ValueError(f"shape {shape}")
        except ValueError as error:
            raise ValueError(
                f"{path} has no whole NumPy header, and is cut short or damaged: {error}"
            ) from error
        start = file.tell()
    if dtype.hasobject:
        raise ValueError(
            f"{path} holds Python objects, a pickle, and reading one runs the code in it: save numbers, with "
            "numpy.save(..., allow_pickle=False)"
        )
    if dtype.type in (np.longdouble, np.clongdouble):
        raise ValueError(f"{path} holds {dtype}, wider than torch's types: save it as float64")
    if dtype.kind not in "biufcV" or dtype.names or (dtype.kind == "V" and dtype.itemsize != 2):
        raise ValueError(
            f"{path} holds {dtype}, which is no type of number here (NumPy writes float8 and other types of ml_dtypes "
            "so): save it as float32"
        )
    if dtype.kind == "V":
        said = "bfloat16 (two-byte void in the file)"
    else:
        said = dtype.str if dtype.byteorder == ">" else dtype.name
    width = dtype.itemsize * math.prod(shape[1:])
    if mapped and path.stat().st_size < start + dtype.itemsize * math.prod(shape):
        raise ValueError(
            f"{path} is cut short: its header says {shape} of {dtype}, and it has {path.stat().st_size} bytes"
        )

    def whole() -> Tensor:
        if mapped:
            # Copied on writing, which nobody does here: torch warns of memory that is read-only.
            return _tensor(np.load(path, mmap_mode="c", allow_pickle=False))
        with opened() as file:
            return _tensor(np.lib.format.read_array(file, allow_pickle=False))

    def rows(count: int) -> Iterator[Tensor]:
        if column_major and len(shape) > 1:
            array = whole()
            for first in range(0, shape[0], count):
                yield array[first : first + count].clone()
            return
        with opened() as file:
            _header(file)
            for first in range(0, shape[0], count):
                here = min(count, shape[0] - first)
                data = file.read(here * width)
                if len(data) != here * width:
                    raise ValueError(
                        f"{path} is cut short: it ends in row {first + len(data) // max(1, width)}"
                    )
                yield _tensor(np.frombuffer(bytearray(data), dtype).reshape(here, *shape[1:]))

    return Stored(shape, said, dtype.itemsize * math.prod(shape), rows, whole)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_major, dtype = read(file)
    return shape, column_major, dtype


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind == "V":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as archive:
            names = list(archive.keys())
            _check_one(path, names)
            part = archive.get_slice(names[0])
            shape = tuple(part.get_shape())

            def rows(count: int) -> Iterator[Tensor]:
                for first in range(0, shape[0], count):
                    yield part[first : first + count]

            def whole() -> Tensor:
                tensor: Tensor = archive.get_tensor(names[0])
                return tensor

            sample = part[0:0] if shape else whole()
            size = sample.dtype.itemsize * math.prod(shape)
            yield Stored(shape, str(sample.dtype).removeprefix("torch."), size, rows, whole)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}") from error
