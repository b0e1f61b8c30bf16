"""What fastent is installed by: the distribution `fastent-torch`, and not the other project called fastent.

On the package index the name fastent belongs to another project, whose package is imported by that name too. Installed
into one environment they share a folder: whichever came last has its ``__init__.py`` there, and to uninstall either one
takes that file away.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

NAME = "fastent-torch"
"""The distribution; what is imported is `fastent`."""


def install_command(extra: str) -> str:
    """Command that installs what `extra` needs: beside what is installed, or from a clone that nobody installed."""
    if _installed(NAME):
        return f"pip install '{NAME}[{extra}]'"
    return f"pip install '.[{extra}]' in a clone of fastent"


def conflict() -> str | None:
    """Sentence with the remedy where the other project stands in this one's place, or in its folder; None elsewhere."""
    package = sys.modules["fastent"]
    other = _installed("fastent")
    if other is not None and not any(str(path) == "fastent/__init__.py" for path in other.files or ()):
        other = None  # an editable installation of this project from before it had its name
    if not hasattr(package, "__version__"):
        place = getattr(package, "__file__", None) or "a folder without __init__.py"
        found = (
            f"`import fastent` gives {place}: another project of that name has replaced {NAME}, or removed it"
        )
    elif other is not None:
        found = f"another project called fastent ({other.version}) is installed in the folder of {NAME}"
    else:
        return None
    restore = f"pip install --force-reinstall --no-deps {_source()}"
    return (
        f"{found}. To have {NAME} alone: {f'pip uninstall --yes fastent && {restore}' if other else restore}"
    )


def refuse_another() -> None:
    """Raise ImportError where `import fastent` gives another project's package."""
    if not hasattr(sys.modules["fastent"], "__version__"):
        raise ImportError(conflict())


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _source() -> str:
    """Where this project was installed from, as pip takes it."""
    found = _installed(NAME)
    recorded = found.read_text("direct_url.json") if found else None
    if not recorded:
        return NAME
    source = json.loads(recorded)
    return ("-e " if source.get("dir_info", {}).get("editable") else "") + str(source["url"])
