"""Names of tasks, models, conditions and measures: ours, those of other packages and those of a script, in one way.

A name stands for an object that is looked up when a run needs it. `fastent.grokking.train`'s own names are listed here
in the form of entry points. Another package adds names by entry points of the same form, in the groups of `GROUPS`::

    [project.entry-points."fastent.tasks"]
    nim = "nim_games:nim"

and a script or notebook, for its own process, by `register`. What stands behind a name, its protocol says:

- task: `tasks.TaskMaker`, a function of a `TrainConfig` that returns a `Task`;
- model: `models.ModelMaker`, a function of a `TrainConfig` and a `Task` that returns a `torch.nn.Module`;
- condition: `conditions.ConditionMaker`, a function of an argument and a `Setting` that returns a `Condition`;
- measure: `measures.Measure`, a function of a `Moment` that returns columns.

Nothing of another package is imported before one of its names is asked for, so one that cannot be imported stops the
runs that need it and no other. Two objects of one name are refused, with where both came from. A name goes into the
names of folders and the pages of reports: it is a lower-case letter, and then letters, digits and underscores.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, Literal

import numpy as np
from torch import Tensor

Kind = Literal["task", "model", "condition", "measure"]

GROUPS: Mapping[Kind, str] = {
    "task": "fastent.tasks",
    "model": "fastent.models",
    "condition": "fastent.conditions",
    "measure": "fastent.measures",
}
"""Entry-point group of each kind."""

_HOUSE = "fastent.grokking.train"

BUILT_IN: Mapping[Kind, Mapping[str, str]] = {
    "task": {
        **dict.fromkeys(("add", "sub", "mul", "mul_nonzero"), f"{_HOUSE}.tasks:modular"),
        "s5": f"{_HOUSE}.tasks:s5",
    },
    "model": {"transformer": f"{_HOUSE}.models:PlainTransformer", "mlp": f"{_HOUSE}.models:PlainMLP"},
    "condition": {name: f"{_HOUSE}.conditions:{name}" for name in ("losses", "logits", "norm")},
    "measure": {
        name: f"{_HOUSE}.measures:{name}"
        for name in ("test_probe", "probe_sizes", "fourier", "progress", "logit_scale")
    },
}
"""Our own names, each with ``module:attribute``."""

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")

TAKEN = ("baseline", "to", "with")
"""First words of conditions that are none: "baseline", "to-the-end", "with-...", which name settings."""


@dataclass(frozen=True)
class Origin:
    """Where a name came from.

    Attributes
    ----------
    kind, name : str
    package : str
        Distribution, such as "nim-games"; "fastent" for ours, "" for what was registered in this process.
    version : str
        Of that distribution, "" where it has none; of what was registered in this process the `fingerprint`.
    place : str
        ``module:attribute``.
    """

    kind: Kind
    name: str
    package: str
    version: str
    place: str

    def __str__(self) -> str:
        where = f"{self.package} {self.version}".strip() if self.package else "this process"
        return f"{where} ({self.place})"


@dataclass(frozen=True)
class _Entry:
    origin: Origin
    load: Callable[[], Any]


_registered: dict[tuple[Kind, str], _Entry] = {}


def register(kind: Kind, name: str, value: Any) -> None:
    """Give an object a name in this process; the same name again, as from a notebook's cell, replaces it.

    Worker processes do not know it: it is for runs in this process (``workers=1``). An entry point is for all.

    Parameters
    ----------
    kind : {"task", "model", "condition", "measure"}
    name : str
        See `check_name`.
    value : object
        What the module's table says.

    Raises
    ------
    ValueError
        If the name cannot be one, or is that of one of ours or of an installed package.
    TypeError
        If `value` cannot be called.
    """
    check_name(kind, name)
    if not callable(value):
        raise TypeError(f"a {kind} must be callable ({__name__}); got {type(value).__name__} for {name!r}")
    place = f"{getattr(value, '__module__', '?')}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    entry = _Entry(Origin(kind, name, "", fingerprint(value), place), lambda: value)
    if others := [other for other in _claims(kind, name) if other.origin.package]:
        raise ValueError(_twice(kind, name, [*others, entry]))
    _registered[kind, name] = entry


def fingerprint(value: object) -> str:
    """Return what tells an object of a script from what it was before somebody changed it, with Python's version.

    It is of the compiled code, which that version decides, of what the code names in its own module, and of the values
    that the object holds. Comments, formatting and docstrings of functions make no difference.

    Examples
    --------
    >>> fingerprint(lambda config: 1)[:8] == fingerprint(lambda config: 2)[:8]
    False
    """
    home = getattr(getattr(value, "func", value), "__module__", "")
    digest = hashlib.sha256("\n".join(_told(value, home, {})).encode()).hexdigest()
    return f"{digest[:8]} of Python {sys.version_info.major}.{sys.version_info.minor}"


def _told(value: Any, home: str, seen: dict[int, Any]) -> Iterator[str]:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield repr(value)
        return
    if id(value) in seen:
        return
    seen[id(value)] = value  # kept alive: another object could get its id
    within: Iterable[Any] = ()
    if isinstance(value, Tensor | np.ndarray):
        yield f"{value.dtype} {value.tolist()}"
    elif isinstance(value, CodeType):
        yield f"{value.co_code.hex()} {value.co_names}"
        within = value.co_consts
    elif isinstance(value, FunctionType) and value.__module__ != home:
        yield f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, FunctionType):
        code = value.__code__
        code = code.replace(co_consts=tuple(each for each in code.co_consts if each != value.__doc__))
        beside = inspect.getclosurevars(value)
        within = (code, value.__defaults__, value.__kwdefaults__, beside.nonlocals, beside.globals)
    elif isinstance(value, functools.partial):
        within = (value.func, value.args, value.keywords)
    elif isinstance(value, staticmethod | classmethod | property):
        within = (value.fget if isinstance(value, property) else value.__func__,)
    elif isinstance(value, Mapping):
        within = [each for key in sorted(value, key=str) for each in (key, value[key])]
    elif isinstance(value, list | tuple):
        within = value
    elif isinstance(value, set | frozenset):
        yield str(sorted(map(repr, value)))
    elif isinstance(value, type):
        yield value.__qualname__
        if value.__module__ == home:
            members = vars(value).items()
            within = (*value.__bases__, {k: v for k, v in members if callable(v) or not k.startswith("__")})
    else:
        known = type(value).__module__ == home or type(value).__module__.startswith("fastent.")
        within = (type(value), vars(value) if known else {})
    for each in within:
        yield from _told(each, home, seen)


def find(kind: Kind, name: str) -> Any:
    """Return the object called `name`, imported if it was not yet.

    Raises
    ------
    ValueError
        If there is none, or more than one, or its package cannot be imported; the message names the packages.
    """
    entry = _entry(kind, name)
    try:
        return entry.load()
    except Exception as error:  # of another's code: whatever it is, the sentence says whose
        if entry.origin.package == "fastent":
            raise
        raise ValueError(
            f"{kind} {name!r} of {entry.origin} cannot be imported ({type(error).__name__}: {error}): mend or "
            f"uninstall {entry.origin.package}, or ask for another {kind}"
        ) from error


def origin(kind: Kind, name: str) -> Origin:
    """Say where a name came from; nothing is imported.

    Raises
    ------
    ValueError
        If there is no such name, or it is there twice.
    """
    return _entry(kind, name).origin


def names(kind: Kind) -> list[Origin]:
    """List all names of a kind, ours first; nothing is imported."""
    others = {*_installed(tuple(sys.path))[kind], *(n for k, n in _registered if k == kind)}
    found = [*BUILT_IN[kind], *sorted(others - BUILT_IN[kind].keys())]
    return [entry.origin for name in found for entry in _claims(kind, name)]


def names_in(condition: str) -> list[str]:
    """List the names that a condition has, without what changes nothing.

    Examples
    --------
    >>> names_in("losses-0.1+norm-as-baseline"), names_in("to-the-end")
    (['losses', 'norm'], [])
    """
    words = (part.partition("-")[0] for part in condition.split("+"))
    return [word for word in words if word not in TAKEN]


def check_known(kind: Kind, name: str, what: str = "") -> None:
    """Check that a name is there; `what` is called so, as by the setting that holds it.

    Raises
    ------
    ValueError
        If it is not. What is twice is refused where it is used.
    """
    if name not in BUILT_IN[kind] and not _claims(kind, name):
        raise ValueError(_unknown(kind, name, what))


def check_name(kind: Kind, name: str) -> None:
    """Check that a name can be one.

    Raises
    ------
    ValueError
        If it has other signs than it may have in the names of folders.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"a {kind}'s name must be a lower-case letter and then at most 39 letters, digits and underscores, for it "
            f"goes into names of folders; got {name!r}"
        )
    if kind == "condition" and name in TAKEN:
        raise ValueError(
            f"a condition may not be called {', '.join(TAKEN)}: these change nothing of the training"
        )


def _entry(kind: Kind, name: str) -> _Entry:
    found = _claims(kind, name)
    if not found:
        raise ValueError(_unknown(kind, name))
    if len(found) > 1:
        raise ValueError(_twice(kind, name, found))
    return found[0]


def _claims(kind: Kind, name: str) -> list[_Entry]:
    ours = BUILT_IN[kind].get(name)
    own = [] if ours is None else [_of_point(kind, importlib.metadata.EntryPoint(name, ours, GROUPS[kind]))]
    here = [_registered[kind, name]] if (kind, name) in _registered else []
    found = _installed(tuple(sys.path))[kind].get(name, [])
    if not (own or here or found):
        _installed.cache_clear()  # a notebook may have installed it since
        found = _installed(tuple(sys.path))[kind].get(name, [])
    return [*own, *here, *found]


def _of_point(kind: Kind, point: importlib.metadata.EntryPoint) -> _Entry:
    package, version = ("fastent", "") if point.dist is None else (point.dist.name, point.dist.version)
    return _Entry(Origin(kind, point.name, package, version, point.value), point.load)


@functools.lru_cache(maxsize=1)
def _installed(path: tuple[str, ...]) -> dict[Kind, dict[str, list[_Entry]]]:
    """Entry points of other packages on `path`, which is sys.path, by kind and name."""
    found: dict[Kind, dict[str, list[_Entry]]] = {kind: {} for kind in GROUPS}
    points = importlib.metadata.entry_points()
    for kind, group in GROUPS.items():
        for point in points.select(group=group):
            with contextlib.suppress(ValueError):  # what can be no name is asked for by none
                check_name(kind, point.name)
                found[kind].setdefault(point.name, []).append(_of_point(kind, point))
    return found


def _unknown(kind: Kind, name: str, what: str = "") -> str:
    known = list(dict.fromkeys(each.name for each in names(kind)))
    return (
        f"{what or kind} must be {', '.join(known[:-1])} or {known[-1]}; got {name!r} (a package adds more by entry "
        f"points of the group {GROUPS[kind]}, a script by {__name__}.register)"
    )


def _twice(kind: Kind, name: str, found: list[_Entry]) -> str:
    return (
        f"{kind} {name!r} is there {len(found)} times: from {' and from '.join(str(e.origin) for e in found)}. Rename "
        "one, or uninstall its package"
    )
