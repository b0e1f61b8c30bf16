"""Packages that are installed for one test: a module and its metadata in a folder on sys.path."""

from pathlib import Path


def install(folder: Path, package: str, module: str, source: str, points: dict[str, dict[str, str]]) -> None:
    """Put a distribution of version 1.0 into `folder`, with entry points by group."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "\n".join(
            f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in each.items())
            for group, each in points.items()
        )
    )
