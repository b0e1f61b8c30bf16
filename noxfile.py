"""Sessions of the project; `nox -l` lists them with the first line of each docstring."""

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests", "lint", "types"]

PROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, *groups: str, extra: str = "train") -> None:
    """Put the project (editable) and dependency groups into the session's environment, in one resolution."""
    project = f".[{extra}]" if extra else "."
    session.install("-e", project, *nox.project.dependency_groups(PROJECT, "limits", *groups))


@nox.session
def demo(session: nox.Session) -> None:
    """Train to grokking on a CPU under the live monitor and write the report with its figures."""
    install(session)
    seeds = session.posargs or ["0-2"]
    session.run("fastent", "run", "e1", "--preset", "quick", "--seeds", *seeds, "--out", "runs/quick")
    session.run("fastent", "report", "runs/quick", "--out", "report")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the default test suite (no GPU needed)."""
    install(session, "test")
    session.run("pytest", "-n", "auto", "--dist", "worksteal", *session.posargs)


@nox.session
def nightly(session: nox.Session) -> None:
    """Run the whole suite with 2,000 examples a property, slow tests included."""
    install(session, "test")
    session.run("pytest", "-n", "auto", "-m", "", *session.posargs, env={"HYPOTHESIS_PROFILE": "nightly"})


@nox.session
def integrations(session: nox.Session) -> None:
    """Test the integrations with the newest release of every host, and write down which; one that is missing fails."""
    install(
        session,
        "test",
        "integrations",
        "frames",
        "fastai-needs",
        extra="train,lightning,transformers,torchmetrics",
    )
    session.install("--no-deps", *nox.project.dependency_groups(PROJECT, "fastai"))
    session.run("pytest", "tests/integrations", "-m", "", *session.posargs, env={"FASTENT_HOSTS": "all"})
    session.run("pytest", "--doctest-modules", "--pyargs", "fastent.integrations")
    if not session.posargs:  # all of it passed
        session.run("python", "tests/integrations/test_integrations_docs.py")


@nox.session
def sweeps(session: nox.Session) -> None:
    """Train the same short runs in a pool, on a Ray that loses a node and by submitit, and compare every byte."""
    install(session, "test", extra="train,sweep,slurm")
    figures = {} if session.posargs else {"FASTENT_SWEEPS": "bench/results/faults/sweeps.json"}
    session.run("pytest", "-n0", "-m", "sweeps", *session.posargs, env=figures)


@nox.session
def examples(session: nox.Session) -> None:
    """Run every example in full, the notebook included, whose committed outputs have to be what comes."""
    install(session, "test", "examples", extra="train,transformers")
    session.run("pytest", "tests/examples", "-m", "", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Do the harm that a run must survive: kills, full disks, damaged files; and write down how much was tried."""
    install(session, "test")
    figures = {} if session.posargs else {"FASTENT_FAULTS": "bench/results/faults/faults.json"}
    session.run("pytest", "-n", "auto", "-m", "not sweeps", *FAULTS, *session.posargs, env=figures)
    if not session.posargs:  # all of it passed
        session.run("python", "-m", "bench.reliability", "--run")


FAULTS = ("tests/faults", "tests/grokking/train/test_sweep.py", "tests/grokking/experiments/test_verify.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Type-check the package with mypy, strict."""
    install(session, "types")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Run the examples in the docstrings and the README."""
    install(session, "test")
    session.run(
        *("pytest", "--doctest-modules", "--pyargs", "fastent", "fastent.reference", "tests/test_readme.py"),
        "--ignore=fastent/integrations",  # whose hosts are in the session `integrations`
    )


@nox.session
def site(session: nox.Session) -> None:
    """Build the documentation's website in site/; a broken link, or what a reader's browser would fetch, fails."""
    session.install(*nox.project.dependency_groups(PROJECT, "site"))
    session.run("mkdocs", "build", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Use a wheel where the tree is not, and a clone alone, beside a wheel and as an editable install."""
    install(session, "test")
    session.run("pytest", "tests/test_packaging.py", "-m", "")


@nox.session
def speed(session: nox.Session) -> None:
    """Time every provider under pytest-benchmark; ``-- --benchmark-compare`` sets it beside a saved run."""
    install(session, "speed")
    peers_warn = ("-W", "ignore")
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    session.run("pytest", "bench", *peers_warn, *session.posargs, env=one_thread)


# Each minor version that the project allows; the last one is that of the committed table.
TRITONS = ("3.6.0", "3.7.0", "3.8.0", "3.9.0")
AOT_TABLE = "bench/results/aot.txt"


@nox.session
def aot(session: nox.Session) -> None:
    """Compile every kernel ahead of time, for all Triton versions and architectures, against the committed table.

    Without a GPU; wavefronts of shared memory and cycles of products in a trip stand in the table too. Arguments go to
    the compiler: ``-- --arch 90 --dtype bf16`` for a part; ``-- --write`` renews the table.
    """
    install(session, extra="")
    renew = "--write" in session.posargs
    chosen = [argument for argument in session.posargs if argument != "--write"]
    command = ("python", "-m", "fastent.kernels.compile")
    for version in TRITONS:
        # Alone: a CUDA build of torch names one version of Triton, and a resolution of both would insist on it.
        session.install("--no-deps", f"triton=={version}")
        if version == TRITONS[-1]:
            table = ("--write" if renew else "--check", AOT_TABLE)
            session.run(*command, "--layout", "contiguous", *table, *chosen)
            others = [
                argument for name in ("transposed", "odd", "strided") for argument in ("--layout", name)
            ]
            session.run(*command, *others, *chosen)
        else:
            session.run(*command, *chosen)
