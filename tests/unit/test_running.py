"""That ``synapse-sticky check`` finds the environment in which Synapse runs the configuration."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from synapse_sticky.cli.check import look
from synapse_sticky.cli.running import elsewhere
from tests.unit.configuration import Files

pytestmark = pytest.mark.requirement("H5")

# It says that it is there, and waits for its end.
_WAITS = "import sys; print(flush=True); sys.stdin.read()"


@contextmanager
def runs(environment: Path, *words: str, cwd: Path | None = None) -> Iterator[int]:
    """A process of this environment, with these words as arguments. Gives its number."""
    python = environment / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    if not python.exists():
        python.symlink_to(Path(sys.executable).resolve())
    pipe = subprocess.PIPE
    command = [str(python), "-S", "-c", _WAITS, *words]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=cwd) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate()


def install(environment: Path, folder: str) -> None:
    """What pip leaves there."""
    (environment / folder / "synapse_sticky-0.1.0.dist-info").mkdir(parents=True)


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "synapse.app.homeserver", "-c", "homeserver.yaml"],
        ["-m", "synapse.app.generic_worker", "--config-path=homeserver.yaml", "-c", "worker.yaml"],
        ["/somewhere/bin/synapse_worker", "--config-path", "homeserver.yaml"],
    ],
)
def test_a_synapse_that_lacks_the_module(tmp_path: Path, words: list[str]) -> None:
    config = tmp_path / "homeserver.yaml"
    config.touch()
    with runs(tmp_path / "venv", *words, cwd=tmp_path) as process:
        problems, remarks = elsewhere([str(config)])
    assert not remarks
    (problem,) = problems
    assert f"(process {process}) runs in {tmp_path}/venv, which does not have" in problem
    assert f"installed in {sys.prefix}." in problem
    assert f"{tmp_path}/venv/bin/python -m pip install" in problem
    assert elsewhere([str(config)]) == ([], [])  # it has ended


@pytest.mark.parametrize(
    "folder", ["lib/python3.11/site-packages", "local/lib/python3.13/dist-packages"]
)
def test_a_synapse_elsewhere_that_has_it(tmp_path: Path, folder: str) -> None:
    config = tmp_path / "homeserver.yaml"
    config.touch()
    install(tmp_path / "venv", folder)
    command = ("-m", "synapse.app.homeserver", "-c", str(config))
    with runs(tmp_path / "venv", *command), runs(tmp_path / "venv", *command):
        problems, remarks = elsewhere([str(config)])
    assert not problems
    (remark,) = remarks  # of both processes, as they are of one environment
    assert f"Check the other with {tmp_path}/venv/bin/python -m synapse_sticky check" in remark


def test_whoever_runs_something_else(tmp_path: Path) -> None:
    config = tmp_path / "homeserver.yaml"
    config.touch()
    here = Path(sys.prefix)
    others = tmp_path / "other.yaml"
    with (
        runs(tmp_path / "a", "-m", "synapse.app.homeserver", "-c", str(others)),
        runs(tmp_path / "b", "-m", "synapse", "-c", str(config)),
        runs(here, "-m", "synapse.app.homeserver", "-c", str(config)),
    ):
        assert elsewhere([str(config)]) == ([], [])


def test_check_tells_of_it(files: Files, tmp_path: Path) -> None:
    path = files.write()
    before = look([path])
    with runs(tmp_path / "venv", "-m", "synapse.app.homeserver", "-c", path):
        report = look([path])
    (problem,) = [said for said in report.problems if said not in before.problems]
    assert "does not have synapse-sticky" in problem
    assert (before.exit_code(), report.exit_code()) == (0, 1)
