"""Which Python environments the configuration runs in now: the one that is checked, or others.

It reads what Linux tells of the processes. What it may not read, or cannot understand, is as if it
was not there.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PROC = Path("/proc")
_APP = "synapse.app."
_PROGRAMS = {"synapse_homeserver", "synapse_worker"}
_CONFIG_OPTIONS = {"-c", "--config-path"}
_INSTALLED = "lib*/python3*/*-packages/synapse_sticky-*.dist-info"
_MOST = 5
"""How many environments are told of."""


def elsewhere(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tells of the other environments in which these files are run by Synapse now.

    Args:
        paths: the files of the configuration.

    Returns:
        The problems, of environments without the module, and the remarks, of those with it; one
        line each.
    """
    asked = {os.path.realpath(path) for path in paths}
    problems, remarks = [], []
    for environment, process in list(_environments(asked))[:_MOST]:
        says = f"a Synapse with this configuration (process {process}) runs in {environment}"
        python = f"{environment}/bin/python"
        if _has_module(environment):
            remarks.append(
                f"{says}. What is said here is of {sys.prefix}. Check the other with {python} -m"
                " synapse_sticky check."
            )
        else:
            problems.append(
                f"{says}, which does not have synapse-sticky: it is installed in {sys.prefix}. Once"
                f" restarted, that Synapse does not start. Install it there: {python} -m pip"
                " install --no-deps WHEEL"
            )
    return problems, remarks


def _has_module(environment: Path) -> bool:
    # Debian's own Python keeps under local what pip installs.
    folders = (environment, environment / "local")
    return any(any(folder.glob(_INSTALLED)) for folder in folders)


def _environments(asked: set[str]) -> Iterator[tuple[Path, int]]:
    """The other environments, each with one of its processes."""
    found = {Path(sys.prefix).resolve()}
    for folder in sorted(PROC.glob("[0-9]*"), key=lambda folder: int(folder.name)):
        try:
            environment = _environment(folder, asked)
        except (OSError, ValueError, RuntimeError):
            continue  # it has ended, or it is somebody else's
        if environment is not None and environment not in found:
            found.add(environment)
            yield environment, int(folder.name)


def _environment(folder: Path, asked: set[str]) -> Path | None:
    """The environment of a process that is a Synapse with one of the files; None if it is not."""
    words = [os.fsdecode(word) for word in (folder / "cmdline").read_bytes().split(b"\0")[:-1]]
    if not any(w.startswith(_APP) or os.path.basename(w) in _PROGRAMS for w in words[:8]):
        return None
    # It may be in a container, with files of its own that have the same names.
    if not os.path.samefile(folder / "root", "/"):
        return None
    cwd = os.readlink(folder / "cwd")
    given = {os.path.realpath(os.path.join(cwd, path)) for path in _given(words)}
    if not given & asked:
        return None
    python = words[0]
    if "/" not in python:
        variables = (folder / "environ").read_bytes().split(b"\0")
        path = next((v[5:] for v in variables if v.startswith(b"PATH=")), b"")
        python = shutil.which(python, path=os.fsdecode(path)) or ""
    # Not through the link to the system's Python: what it is called by tells the environment.
    programs = Path(os.path.abspath(os.path.join(cwd, python))).parent
    return programs.parent.resolve() if python and programs.name == "bin" else None


def _given(words: Sequence[str]) -> Iterator[str]:
    """The files of the configuration that a process was given."""
    for option, value in zip(words, [*words[1:], ""], strict=True):
        if option in _CONFIG_OPTIONS:
            yield value
        elif option.startswith("--config-path="):
            yield option.partition("=")[2]
