"""Who may import whom: library <- study <- benchmarks, one way; kernels and reference stand alone; no circles."""

import ast
import functools
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOUSES = {
    "fastent": "fastent",
    "kernels": "fastent.kernels",
    "reference": "fastent.reference",
    "bench": "bench",
}
STUDY = ("fastent.grokking",)
# The command line, where the library and the study meet; nothing else of the library imports it.
COMMANDS = {"fastent.cli"}
INTEGRATIONS = "fastent.integrations"
# Imported only when something is drawn or shown: what each needs beside the library's own dependencies.
PICTURES = {"fastent.plots": {"matplotlib"}, "fastent.display": {"rich"}}
CONFIGURATION = {"fastent.grokking.train.config"}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in HOUSES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


@functools.cache
def imports(name: str, *, lazily: bool) -> set[str]:
    """Modules that `name` imports when it is imported, or `lazily` too: inside functions and for types alone."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found, waiting = set(), [ast.parse(MODULES[name].read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {source}
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if lazily or not later:
            waiting += ast.iter_child_nodes(node)
    return found


def room(name: str) -> str:
    for house in ("bench", "fastent.kernels", "fastent.reference", *STUDY):
        if name == house or name.startswith(house + "."):
            return "study" if house in STUDY else house
    return "library" if name.partition(".")[0] == "fastent" else name.partition(".")[0]


def visited(of: str, *, lazily: bool = True) -> dict[str, set[str]]:
    """Rooms and packages beside its own, and the standard library, that each module of a room imports."""
    found = {
        name: {room(target) for target in imports(name, lazily=lazily)} - {of} - sys.stdlib_module_names
        for name in MODULES
        if room(name) == of
    }
    assert found
    return found


def test_the_library_imports_the_kernels_and_what_it_depends_on() -> None:
    allowed = {"fastent.kernels", "torch", "numpy", "scipy"}
    extras = (INTEGRATIONS, "fastent.testing")  # imported by name only
    for name, rooms in visited("library").items():
        if name not in COMMANDS and not name.startswith(extras):
            assert rooms <= allowed | PICTURES.get(name, set()), name
            at_once = imports(name, lazily=False)
            assert "fastent.plots" not in at_once, name
            assert name == "fastent.plots" or not {room(target) for target in at_once} & {
                "matplotlib",
                "rich",
            }, name
            assert not imports(name, lazily=True) & COMMANDS, name
            # What `import fastent` brings needs neither Triton nor a kernel.
            assert "fastent.kernels" not in {room(target) for target in imports(name, lazily=False)}, name


def test_the_front_door_names_one_thing_of_the_study_and_imports_it_when_asked() -> None:
    named = {
        (name, node.value)
        for name in MODULES
        if room(name) == "library" and name not in COMMANDS
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith(STUDY)
        and node.value in MODULES
    }
    assert named == {("fastent", "fastent.grokking.experiments.tables")}


def test_an_integration_imports_its_host_and_the_library_and_nothing_imports_it() -> None:
    hosts = {
        f"{INTEGRATIONS}.{name}": {name}
        for name in ("lightning", "transformers", "torchmetrics", "accelerate")
    }
    hosts[f"{INTEGRATIONS}.transformers"].add("accelerate")  # the Trainer stands on it
    hosts[f"{INTEGRATIONS}.lightning"].add("lightning_utilities")  # a part of the host
    integrations = {name for name in MODULES if name.startswith(INTEGRATIONS + ".")}
    rooms = visited("library")
    for name in integrations:
        assert rooms[name] <= {"torch"} | hosts.get(name, set()), name
        assert not imports(name, lazily=True) & COMMANDS, name
    assert [name for name in MODULES if imports(name, lazily=True) & integrations] == []


def test_the_command_line_imports_the_study_when_a_command_needs_it_but_for_the_settings_it_parses() -> None:
    assert "study" in visited("library")["fastent.cli"]
    at_once = imports("fastent.cli", lazily=False)
    assert {name for name in at_once if room(name) == "study"} <= CONFIGURATION
    assert {room(name) for name in at_once} - sys.stdlib_module_names <= {
        "library",
        "study",
        "torch",
        "numpy",
    }


def test_the_study_imports_the_library_and_the_reference_and_no_benchmark() -> None:
    for name, rooms in visited("study").items():
        assert not rooms & {"bench", "fastent.kernels"}, name
        assert not imports(name, lazily=True) & COMMANDS, name


def test_kernels_import_torch_and_triton_alone_and_the_reference_numpy_alone() -> None:
    for house, allowed in (("fastent.kernels", {"torch", "triton"}), ("fastent.reference", {"numpy"})):
        for name, rooms in visited(house).items():
            assert rooms <= allowed, name


def test_nothing_imports_the_benchmarks() -> None:
    assert [
        name for name in MODULES if room(name) != "bench" and "bench" in map(room, imports(name, lazily=True))
    ] == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: (imports(name, lazily=True) & MODULES.keys()) - {name} for name in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # CycleError names the circle


def test_the_trainer_needs_no_package_of_the_command_line_and_the_report() -> None:
    # A machine with a GPU may have torch, Triton and safetensors alone; only the progress bar draws.
    for name in MODULES:
        if name.startswith("fastent.grokking.train.") and not name.endswith(".progress"):
            needed = {target.partition(".")[0] for target in imports(name, lazily=False)}
            assert needed - sys.stdlib_module_names <= {"fastent", "numpy", "torch", "safetensors"}, name
