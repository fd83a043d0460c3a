"""A virtual environment for each version of Synapse, with the module as its users install it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path

import attr
from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[2]
FOLDER = PROJECT / ".venv-compat"
_SYNAPSE = "matrix-synapse"
# Of what the project is developed with: what tests/lab and tests/conftest.py import, and pytest.
_FOR_LAB = (
    "cryptography",
    "hypothesis",
    "psycopg2-binary",
    "pytest",
    "pytest-timeout",
    "requests",
)
_PIP_S = 1200
_BUILD_S = 1800


class StepError(Exception):
    """A step did not work; with the end of what was printed."""


def ended(
    command: Sequence[str], timeout_s: float, cwd: Path = PROJECT
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, however it ends.

    Raises:
        StepError: it took too long.
    """
    try:
        return subprocess.run(
            command,
            check=False,
            cwd=cwd,
            env=clean_env(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise StepError(f"{' '.join(command)} was not done within {timeout_s:.0f} s") from None


def end_of_output(done: subprocess.CompletedProcess[str]) -> str:
    """The last that a program printed."""
    return (done.stdout + done.stderr).strip()[-3000:]


def _run(*command: str, timeout_s: float) -> str:
    """Runs a program and gives what it printed.

    Raises:
        StepError: it failed, or took too long.
    """
    done = ended(command, timeout_s)
    if done.returncode:
        said = end_of_output(done)
        raise StepError(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    return done.stdout


def clean_env() -> dict[str, str]:
    """This process's environment, without what has Python look into other folders."""
    return {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}


def newest() -> str:
    """The version of Synapse that pip installs if none is asked for.

    Raises:
        StepError: pip could not say.
    """
    options = "--quiet --disable-pip-version-check --dry-run --ignore-installed --no-deps"
    command = (sys.executable, "-m", "pip", "install", *options.split(), "--report", "-", _SYNAPSE)
    report = json.loads(_run(*command, timeout_s=_PIP_S))
    version: str = report["install"][0]["metadata"]["version"]
    return version


def build_wheel() -> Path:
    """The module's wheel: one for all environments, as the Rust core is for any Python.

    Raises:
        StepError: it could not be built.
    """
    folder = FOLDER / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    # It stays on this machine, so it need not run on older ones.
    options = "--release --quiet --compatibility off"
    command = (sys.executable, "-m", "maturin", "build", *options.split(), "--out", str(folder))
    _run(*command, timeout_s=_BUILD_S)
    (wheel,) = folder.glob("*.whl")
    return wheel


def workplace() -> Path:
    """A folder with the tests, but without the module's source: what is imported is installed."""
    folder = FOLDER / "workplace"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tests", "pyproject.toml"):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(PROJECT / name)
    return folder


def _requirements(version: str) -> list[str]:
    """What is installed beside the module."""
    asked = (Requirement(line) for line in requires("synapse-sticky") or ())
    lab = {r.name: f"{r.name}{r.specifier}" for r in asked if r.name in _FOR_LAB}
    return [f"{_SYNAPSE}=={version}", *(lab[name] for name in _FOR_LAB)]


@attr.s(auto_attribs=True, frozen=True)
class Environment:
    """The environment of one version of Synapse."""

    version: str

    @property
    def folder(self) -> Path:
        return FOLDER / self.version

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def _made_of(self) -> Path:
        return self.folder / "made-of.txt"

    def is_there(self) -> bool:
        """Was it made to the end, of what is asked for now?"""
        wanted = "\n".join(_requirements(self.version))
        return self._made_of.exists() and self._made_of.read_text() == wanted

    def make(self) -> None:
        """Makes it anew, with Synapse and what the lab needs.

        Raises:
            StepError: it could not be made.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        requirements = _requirements(self.version)
        _run(sys.executable, "-m", "venv", str(self.folder), timeout_s=_PIP_S)
        self._pip(*requirements)
        self._made_of.write_text("\n".join(requirements))

    def install(self, wheel: Path) -> None:
        """Installs the module, in the place of the one that is there.

        Raises:
            StepError: it could not be installed.
        """
        # Without its dependencies: all of them are Synapse's, too. It asks for a Synapse that it
        # fits, and pip would bring another one than this environment is for.
        self._pip("--no-deps", "--no-index", "--force-reinstall", str(wheel))

    def _pip(self, *arguments: str) -> None:
        options = ("--quiet", "--disable-pip-version-check")
        _run(self.python, "-m", "pip", "install", *options, *arguments, timeout_s=_PIP_S)
