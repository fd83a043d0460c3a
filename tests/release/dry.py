"""Running the commands of the workflows dry: the scripts run as they do there, but whatever would
build, publish or reach out only says what it would do."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.release.notes import PROJECT, version

_WORKFLOWS = (".github/workflows/ci.yml", ".github/workflows/release.yml")
_PINNED = re.compile(r"uses: (?!\./)[\w./-]+@[0-9a-f]{40} # v\d[\w.]*$")
# What the scripts find in the place of the programs. They show the words that they are given; make
# also looks whether it knows the targets.
_SAYING = '#!/bin/sh\necho "would run: {name} $*"\n'
_MAKE = _SAYING + 'exec "{make}" -C "{project}" --dry-run "$@" > /dev/null\n'
# The Python of a runner has no packages.
_PYTHON = '#!/bin/sh\nexec "{python}" -S "$@"\n'
_EXPRESSION = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")


class Step:
    """A command of a workflow, for one combination of its matrix."""

    def __init__(self, place: str, script: str, variables: dict[str, str]) -> None:
        self.place = place
        self.script = script
        self.variables = variables


def steps() -> Iterator[Step]:
    """All commands of the workflows, in their order."""
    for path in _WORKFLOWS:
        workflow = yaml.safe_load((PROJECT / path).read_text())
        for name, job in workflow["jobs"].items():
            for values in _combinations(job.get("strategy", {}).get("matrix", {})):
                chosen = {f"matrix.{key}": str(value) for key, value in values.items()}
                for step in job.get("steps", ()):
                    if "run" in step:
                        given = {**job.get("env", {}), **step.get("env", {})}
                        variables = {k: _filled(v, chosen) for k, v in given.items()}
                        said = " ".join(str(value) for value in values.values())
                        place = f"{Path(path).name}, {name}" + (f" ({said})" if said else "")
                        yield Step(place, step["run"], variables)


def _combinations(matrix: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "include" in matrix:
        yield from matrix["include"]
        return
    for values in itertools.product(*matrix.values()):
        yield dict(zip(matrix, values, strict=True))


def _filled(value: object, chosen: dict[str, str]) -> str:
    """A variable's value; what only the runner knows is named."""
    return _EXPRESSION.sub(lambda found: chosen.get(found[1], f"<{found[1]}>"), str(value))


def unpinned() -> list[str]:
    """The actions that are not named by a whole commit hash with the version behind it."""
    return [
        f"{path}:{number}: {line.strip()}"
        for path in _WORKFLOWS
        for number, line in enumerate((PROJECT / path).read_text().splitlines(), 1)
        if "uses:" in line and "uses: ./" not in line and not _PINNED.search(line)
    ]


def run_dry(step: Step, folder: Path) -> tuple[int, str]:
    """Runs a command as the runner would. Gives its exit code and what it printed."""
    if "${{" in step.script:
        return 1, "an expression within a script is put into it unquoted: give it by env"
    env = {
        **os.environ,
        "PATH": os.pathsep.join((str(folder / "bin"), os.environ.get("PATH", ""))),
        "PYTHONPATH": str(PROJECT),
        "GITHUB_REF_NAME": f"v{version()}",
        "GITHUB_REPOSITORY": "owner/synapse-sticky",
        "GITHUB_ENV": str(folder / "env"),
        "RUNNER_TEMP": str(folder),
        **step.variables,
    }
    # Some commands write beside the project's files, such as notes.md. They do so here instead.
    command = ("bash", "-euo", "pipefail", "-c", step.script)
    done = subprocess.run(
        command, check=False, cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    return done.returncode, (done.stdout + done.stderr).strip()


def run_all(say: Callable[[str], object]) -> list[str]:
    """Runs all commands dry. Gives what failed."""
    failures = [f"not pinned by a hash: {line}" for line in unpinned()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _furnish(folder)
        for step in steps():
            code, said = run_dry(step, folder)
            say(f"{step.place}: {' '.join(step.script.split())}\n    {said or 'nothing is said'}")
            if code:
                failures.append(f"{step.place}: ended with {code}: {said[-500:]}")
    return failures


def _furnish(folder: Path) -> None:
    """The folder that the commands run in: the stand-ins, the Makefile, a wheel to be published."""
    programs = folder / "bin"
    programs.mkdir()
    texts = {name: _SAYING.format(name=name) for name in ("docker", "gh", "sudo")}
    texts["make"] = _MAKE.format(name="make", make=shutil.which("make"), project=PROJECT)
    texts["python"] = _PYTHON.format(python=sys.executable)
    for program, text in texts.items():
        (programs / program).write_text(text)
        (programs / program).chmod(0o755)
    (folder / "dist").mkdir()
    (folder / "dist" / f"synapse_sticky-{version()}.tar.gz").touch()
