"""A wheel works where the tree is not, and a clone works alone, beside a wheel and installed as editable.

The packages `fastent.kernels` and `fastent.reference` lie in the folders kernels and reference. The wheel maps them
(pyproject.toml); in a clone fastent/kernels and fastent/reference are links to the folders, which Python, editors and
type checkers follow.

Without its extras a clone still collects all its tests: one module that cannot be imported would end ``pytest -m gpu``
on a machine with torch and Triton alone before its first test.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement

import fastent
from fastent import installation

ROOT = Path(__file__).parent.parent

# For each program below: an editable install of the tree would step in for what is missing.
ALONE = """
import os, sys
from pathlib import Path
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
"""
USE = """
import torch, fastent, fastent.kernels, fastent.reference.entropy, fastent.grokking.train, fastent.grokking.experiments
here = Path(sys.argv[1])
for module in (fastent, fastent.kernels, fastent.reference.entropy, fastent.grokking.train):
    assert Path(module.__file__).is_relative_to(here), module.__file__
h = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ours = fastent.spectral_entropy(h).entropy
triton = fastent.spectral_entropy(h, backend="triton").entropy
assert abs(ours - triton) < 1e-13
print(ours)
"""
PYTEST = ALONE + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
BARE = "import sys; sys.modules.update(dict.fromkeys({optional!r})); "  # no import of these succeeds
PLACES = """
import fastent, fastent.kernels.launch, fastent.reference.entropy
for module in (fastent, fastent.kernels.launch, fastent.reference.entropy):
    print(Path(module.__file__).resolve())
"""
CHOSEN = (
    "-q",
    "-p",
    "no:cacheprovider",
    "tests/kernels/test_launch.py",
    "tests/reference/test_reference_alone.py",
)


def copy_of_the_tree(place: Path) -> Path:
    """Make a clone: the tracked files as they are now, links as links."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, files.decode().split("\0")):
        if (ROOT / name).exists():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name, follow_symlinks=False)
    return place


def built(kind: str, clone: Path, out: Path) -> Path:
    build = f"import sys, setuptools.build_meta as build; print(build.build_{kind}(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=clone, check=True, capture_output=True)
    (path,) = out.glob("fastent_torch-*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    return built("wheel", copy_of_the_tree(out / "source"), out)  # the build leaves its folders where it runs


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return copy_of_the_tree(tmp_path / "clone")


def places(clone: Path) -> list[str]:
    """What `PLACES` prints where all is found in a clone."""
    return [
        str(clone / name) for name in ("fastent/__init__.py", "kernels/launch.py", "reference/entropy.py")
    ]


def run(
    program: str, *arguments: str, cwd: Path, site: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program without the folder it runs in on its path, as a command does; `site` is what is installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": "" if site is None else str(site)}
    command = [sys.executable, "-P", "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def installed_elsewhere(wheel: Path, site: Path) -> Path:
    """Install the wheel; whoever imports it in the place of the clone is told."""
    zipfile.ZipFile(wheel).extractall(site)
    (site / "fastent" / "mixing.py").write_text("raise RuntimeError('this is the installed one')")
    return site


def test_a_clone_tests_itself_with_nothing_installed(clone):
    result = run(PYTEST, *CHOSEN, cwd=clone)
    assert result.returncode == 0, result.stdout + result.stderr


def optional() -> set[str]:
    """Packages that the extras bring and the suite does not, by the names that they are imported by."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [item for extra in project["project"]["optional-dependencies"].values() for item in extra]
    return {re.split(r"\W", item)[0] for item in {*extras} - {*project["dependency-groups"]["test"]}}


def test_a_test_module_that_imports_an_optional_package_skips_where_that_is_missing():
    assert {"tyro", "matplotlib", "lightning"} <= optional()
    skip = re.compile(r'^pytest\.importorskip\("(\w+)', re.MULTILINE)
    for path in (ROOT / "tests").rglob("test_*.py"):
        above = path.with_name("conftest.py")
        skipped = skip.findall(path.read_text()) + (skip.findall(above.read_text()) if above.exists() else [])
        imported = set(re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)) & optional()
        assert imported <= set(skipped), path.relative_to(ROOT)


def test_a_test_module_that_calls_the_command_line_says_that_this_takes_tyro():
    called = re.compile(r"^from fastent(\.cli)? import (.*\b)?(cli|main)\b", re.MULTILINE)
    texts = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    modules = [name for name, text in texts.items() if called.search(text)]
    assert Path("tests/test_cli.py") in modules
    assert [name for name in modules if 'importorskip("tyro")' not in texts[name]] == []


@pytest.mark.nightly
@pytest.mark.parametrize("missing", [{"tyro"}, optional()], ids=["tyro", "all extras"])
def test_the_gpu_tests_are_collected_where_the_extras_are_not(missing):
    options = ("-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider")
    result = run(BARE.format(optional=sorted(missing)) + PYTEST, *options, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("kernels/test_gpu.py", "monitor/test_deferred_machines.py", "monitor/test_monitor.py"):
        assert f"tests/{name}::" in result.stdout


@pytest.mark.nightly
def test_a_clone_tests_itself_beside_a_wheel_installed_elsewhere(clone, wheel, tmp_path):
    site = installed_elsewhere(wheel, tmp_path / "site")
    assert "this is the installed one" in run("import fastent", cwd=tmp_path, site=site).stderr
    result = run(PYTEST, *CHOSEN, cwd=clone, site=site)
    assert result.returncode == 0, result.stdout + result.stderr


def test_programs_started_in_a_clone_run_what_lies_there_beside_a_wheel(clone, wheel, tmp_path):
    site = installed_elsewhere(wheel, tmp_path / "site")
    suite = "import bench.suite; bench.suite.main(['--help'])"
    started = ALONE + "sys.path.insert(0, os.getcwd())" + PLACES + suite  # `python -m` puts the folder there
    found = run(started, cwd=clone, site=site)
    assert found.stdout.split()[:3] == places(clone), found.stderr
    assert "in_training" in found.stdout, found.stderr


@pytest.mark.nightly
def test_fastent_bench_of_a_wheel_measures_the_clone_that_it_is_called_in(clone, wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    call = "import sys; from fastent.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ("bench", "--quick", "--only", "forecast", "--out", str(tmp_path / "out"))
    result = run(ALONE + call, *options, cwd=clone, site=tmp_path / "site")
    assert result.returncode == 0, result.stderr
    assert "## Forecast" in (tmp_path / "out" / "cpu" / "report.md").read_text()


@pytest.mark.nightly
def test_an_editable_install_finds_both_folders_from_anywhere(clone, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(built("editable", clone, tmp_path)).extractall(site)
    program = ALONE + "import site; sys.path.insert(0, sys.argv[1]); site.addsitedir(sys.argv[1])" + PLACES
    found = run(program, str(site), cwd=tmp_path)
    assert found.stdout.split() == places(clone), found.stderr


@pytest.mark.nightly
def test_a_clone_without_its_links_says_what_to_type(clone):
    for name in ("kernels", "reference"):
        link = clone / "fastent" / name
        link.unlink()
        link.write_text(f"../{name}")  # as git writes it where a system has no links
    result = run(PYTEST, *CHOSEN, cwd=clone)
    assert result.returncode != 0
    assert "type: pip install -e ." in result.stdout + result.stderr


@pytest.mark.parametrize("name", ["kernels", "reference"])
def test_editors_and_type_checkers_find_the_folders_under_the_package(name):
    assert (ROOT / "fastent" / name).resolve() == ROOT / name


def test_the_wheel_holds_the_packages_and_no_top_level_module_but_fastent(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"fastent", next(name for name in top if name.endswith(".dist-info"))}
    data = (f"fastent/grokking/experiments/{name}" for name in ("claims.toml", "page.html.jinja"))
    code = ("fastent/py.typed", "fastent/kernels/covariance.py", "fastent/reference/entropy.py")
    assert {*code, *data} <= set(names)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastent").rglob("*.py")}
    assert "fastent/integrations/lightning.py" in modules
    assert modules <= set(names)


@pytest.mark.interpreter
def test_the_wheel_works_where_the_tree_is_not(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    result = run(ALONE + USE, str(tmp_path / "site"), cwd=tmp_path, site=tmp_path / "site")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 1.0


INSTALL = re.compile(r"\b(?:pip3?|pipx|uv|conda|poetry)\b[^\n;&|]*\b(?:install|add)\b([^\n;&|`]*)")
NAMED = re.compile(r"(?<![\w./-])fastent(?![\w-])(?!\.\w)|(?<![\w-])fastent\[")  # neither a path nor a module


def installs_the_other_project(line: str) -> bool:
    return any(NAMED.search(what.partition(" in a clone of ")[0]) for what in INSTALL.findall(line))


def test_nothing_in_the_tree_says_to_install_the_other_project_of_this_name():
    wrong = ("pip install fastent", "uv add 'fastent[train]'", 'pip install -U "fastent>=0.1" torch')
    right = ("pip install 'fastent-torch[train]'", "pip install -e .", "pip uninstall --yes fastent")
    assert [installs_the_other_project(line) for line in (*wrong, *right)] == [True] * 3 + [False] * 3
    command = (
        "git",
        "grep",
        "-I",
        "--no-color",
        "-E",
        "(install|add).*fastent",
        "--",
        ":!tests/test_packaging.py",
    )
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) > 5
    assert [line for line in lines if installs_the_other_project(line)] == []


def test_an_extra_is_installed_by_our_name_or_from_the_clone(monkeypatch):
    monkeypatch.setattr(installation, "distribution", lambda name: {"fastent-torch": SimpleNamespace()}[name])
    assert installation.install_command("train") == "pip install 'fastent-torch[train]'"

    def nothing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installation, "distribution", nothing)
    assert installation.install_command("train") == "pip install '.[train]' in a clone of fastent"
    assert installation.conflict() is None


@pytest.fixture
def both(wheel: Path, tmp_path: Path) -> Path:
    """The wheel with the other project installed over it, as pip leaves the two."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "fastent" / "__init__.py").write_text("")  # all that the other one's holds
    other = site / "fastent-0.7.3.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: fastent\nVersion: 0.7.3\n")
    (other / "RECORD").write_text("fastent/__init__.py,,\nfastent/anotator.py,,\n")
    return site


RESTORE = "pip uninstall --yes fastent && pip install --force-reinstall --no-deps fastent-torch"


@pytest.mark.parametrize(
    "program",
    [
        "from fastent.cli import main; sys.exit(main(['list']))",
        "import fastent.integrations.loggers",
        "import fastent.grokking.train",
    ],
)
def test_the_other_project_in_our_place_is_refused_in_a_sentence(program, both, tmp_path):
    result = run(ALONE + program, cwd=tmp_path, site=both)
    assert result.returncode == 1
    assert result.stderr.strip().endswith(
        f"`import fastent` gives {both / 'fastent' / '__init__.py'}: another project of that name has replaced "
        f"fastent-torch, or removed it. To have fastent-torch alone: {RESTORE}"
    )
    assert ("Traceback" in result.stderr) == ("cli" not in program)


def test_a_package_whose_init_the_other_project_took_along_is_refused(both, tmp_path):
    (both / "fastent" / "__init__.py").unlink()
    shutil.rmtree(both / "fastent-0.7.3.dist-info")
    result = run(ALONE + "import fastent.cli", cwd=tmp_path, site=both)
    assert result.stderr.startswith("fastent: `import fastent` gives a folder without __init__.py")
    assert result.stderr.strip().endswith("alone: pip install --force-reinstall --no-deps fastent-torch")


def test_the_other_project_in_our_folder_is_named_with_the_remedy(monkeypatch):
    def installed(name: str) -> SimpleNamespace:
        url = '{"url": "file:///clone", "dir_info": {"editable": true}}'
        files = ["fastent/__init__.py"] if name == "fastent" else []
        return SimpleNamespace(version="0.7.3", files=files, read_text=lambda file: url)

    monkeypatch.setattr(installation, "distribution", installed)
    assert installation.conflict() == (
        "another project called fastent (0.7.3) is installed in the folder of fastent-torch. To have fastent-torch "
        "alone: pip uninstall --yes fastent && pip install --force-reinstall --no-deps -e file:///clone"
    )


def test_the_version_has_one_source(wheel):
    assert wheel.name.startswith(f"fastent_torch-{fastent.__version__}-")
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    assert f"\nversion: {fastent.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {fastent.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def groups(project: dict, *names: str) -> list[str]:
    entries = [entry for name in names for entry in project["dependency-groups"][name]]
    return [
        each
        for entry in entries
        for each in ([entry] if isinstance(entry, str) else groups(project, entry["include-group"]))
    ]


def test_every_session_that_installs_the_project_keeps_to_the_torch_that_ci_has(monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    sessions: list[Callable[[object], None]] = []
    nox = ModuleType("nox")
    nox.Session, nox.options = object, SimpleNamespace()
    nox.session = lambda function: sessions.append(function) or function
    nox.project = SimpleNamespace(load_toml=lambda name: project, dependency_groups=groups)
    monkeypatch.setitem(sys.modules, "nox", nox)
    runpy.run_path(str(ROOT / "noxfile.py"))
    installed: list[tuple[str, ...]] = []
    fake = SimpleNamespace(posargs=[], install=lambda *names: installed.append(names), run=lambda *a, **k: 0)
    for session in sessions:
        session(fake)
    (limit,) = project["dependency-groups"]["limits"]
    with_project = [names for names in installed if "-e" in names]
    assert len(with_project) > 5
    assert [names for names in with_project if limit not in names] == []
    kept = Requirement(limit).specifier
    assert [kept.contains(release) for release in ("2.11.0", "2.13.0", "2.14.1")] == [True, True, False]
