"""Installing what was built as an administrator would, and running Synapse with it.

Nothing of this machine is at hand there: no variable, and no program on PATH but those of the
environment itself, so no cargo, no cc, no make.
"""

import json
import os
import platform as machine
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.say import say
from tests.wheels import PLATFORMS, Platform, StepError, needed, network_settings, run
from tests.wheels.audit import find, no_panics

Step = tuple[str, Callable[[], str]]

_OLDEST = (3, 10)
_NEWEST_KNOWN = (3, 14)
_MOST_S = 120
"""From ``pip install``, with all that it needs at hand, to a sticky event."""
_ASKED = (
    "import json, platform, sys, sysconfig; print(json.dumps([platform.python_implementation(),"
    " sys.version_info[:3], bool(sysconfig.get_config_var('Py_GIL_DISABLED')), sys.executable]))"
)
_PROGRAM = Path(__file__).with_name("started.py")


def here() -> Platform:
    """This machine's platform.

    Raises:
        StepError: no wheel is built for it.
    """
    libc = "manylinux" if machine.libc_ver()[0] == "glibc" else "musllinux"
    name = f"{libc}-{machine.machine()}"
    for platform in PLATFORMS:
        if platform.name == name:
            return platform
    raise StepError(f"no wheel is built for {name}")


def interpreters(asked: list[str]) -> dict[tuple[int, int], str]:
    """The CPythons to prove it on, one for each minor version; those that were asked for, or those
    on PATH and of pyenv.

    Raises:
        StepError: one that was asked for is of no use, or there is none.
    """
    found: dict[tuple[int, int], str] = {}
    for program in asked or _candidates():
        try:
            kind, version, free_threaded, path = json.loads(run((program, "-c", _ASKED)))
        except (StepError, ValueError):
            kind, version, free_threaded, path = "nothing", (0, 0, 0), False, program
        # abi3 is not for builds without the GIL.
        usable = kind == "CPython" and tuple(version[:2]) >= _OLDEST and not free_threaded
        if usable:
            found.setdefault((version[0], version[1]), path)
        elif asked:
            raise StepError(f"{program} is no CPython of 3.10 or later")
    if not found:
        raise StepError("no CPython of 3.10 or later is on PATH or in pyenv")
    return dict(sorted(found.items()))


def _candidates() -> Iterator[str]:
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    yield from (str(path) for path in sorted(pyenv.glob("*/bin/python"), reverse=True))
    for folder in os.get_exec_path():
        yield from (str(path) for path in sorted(Path(folder).glob("python3*")) if _named(path))
    yield sys.executable


def _named(path: Path) -> bool:
    end = path.name.removeprefix("python3")
    return not end or (end.startswith(".") and end[1:].isdecimal())


def prove_wheel(out: Path, asked: list[str]) -> Iterator[Step]:
    """The wheel for this machine, on each interpreter."""
    wheel = find(here(), sorted(out.glob("*.whl")))
    pythons = interpreters(asked)
    if not asked:
        for minor in range(_OLDEST[1], _NEWEST_KNOWN[1] + 1):
            if (3, minor) not in pythons:
                say(f"CPython 3.{minor}: not on PATH or in pyenv, so not proved here")
    for (major, minor), python in pythons.items():
        yield (
            f"{wheel.name} on CPython {major}.{minor} ({python})",
            partial(_proved, wheel, python),
        )


def prove_sdist(out: Path, asked: list[str]) -> Iterator[Step]:
    """The sdist: built with Rust and cc, on the newest interpreter; run without."""
    sdists = sorted(out.glob("*.tar.gz"))
    if len(sdists) != 1:
        raise StepError(f"there are {len(sdists)} sdists in {out}, not one: make wheels")
    python = list(interpreters(asked).values())[-1]
    yield f"{sdists[0].name} on {python}", partial(_proved_sdist, sdists[0], python)


def _proved_sdist(sdist: Path, python: str) -> str:
    needed("cargo", "building the sdist needs Rust")
    needed("cc", "building the sdist needs a linker")
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if k != "MATURIN_PEP517_ARGS"}
        command = (
            python,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            folder,
            sdist,
        )
        run(command, env=env, cwd=Path(folder))
        (wheel,) = Path(folder).glob("*.whl")
        no_panics(wheel)
        return _proved(wheel, python)


def _proved(wheel: Path, python: str) -> str:
    """Installs it into a clean environment, and runs ``started.py`` there.

    What it needs is fetched before that, so the time that is told and held is that of an
    administrator without the download: from ``pip install`` to a sticky event.

    Raises:
        StepError: any of it failed, or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="synapse-sticky-") as name:
        folder = Path(name)
        environment, fetched = folder / "env", folder / "fetched"
        bare = {"PATH": str(environment / "bin"), "HOME": name}
        run((python, "-m", "venv", environment), env=bare, cwd=folder)
        installed = environment / "bin" / "python"
        # pip reaches the registries by this machine's settings, and keeps what it got. Nothing is
        # built: all that Synapse needs comes as wheels.
        cache = os.environ.get("PIP_CACHE_DIR") or str(Path.home() / ".cache" / "pip")
        pip = (installed, "-m", "pip", "--quiet", "--disable-pip-version-check")
        run(
            (*pip, "download", "--only-binary", ":all:", "--dest", fetched, wheel),
            env={**bare, **network_settings(), "PIP_CACHE_DIR": cache},
            cwd=folder,
        )
        began_s = time.monotonic()
        run((*pip, "install", "--no-index", "--find-links", fetched, wheel), env=bare, cwd=folder)
        pip_s = time.monotonic() - began_s
        program = shutil.copy(_PROGRAM, folder)
        said = run((installed, "-I", program), env=bare, cwd=folder, timeout_s=600)
        took_s = time.monotonic() - began_s
        if took_s > _MOST_S:
            raise StepError(f"{said.strip()}; but all of it took {took_s:.0f} s, not {_MOST_S}")
        return f"{said.strip()}; pip took {pip_s:.0f} s, all of it {took_s:.0f} s"
