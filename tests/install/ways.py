"""Each way: Synapse as it is installed there, the module as an administrator adds it, and what
takes it away again."""

import re
import shutil
import sys
from pathlib import Path

from tests.install.place import SYNAPSE, Place
from tests.say import say
from tests.wheels import PROJECT, MissingError, StepError
from tests.wheels.prove import interpreters

_VENV = "/opt/venvs/matrix-synapse"
_SYSTEM = "/usr/bin/python3"
LACKS_SYNAPSE = "(ModuleNotFoundError: No module named 'synapse')"
"""How Synapse ends where the environment finds nothing of it; docs/install.md says it."""
# A Debian keeps pip from its own Python; the image's Python is not Debian's.
_MARKER = "usr/lib/python3*/EXTERNALLY-MANAGED"
DOCKERFILE = PROJECT / "contrib" / "docker" / "Dockerfile"


def pip(place: Place, wheel: Path) -> None:
    """An environment that has Synapse already."""
    environment = f"{place.home}/venv"
    place.run(sys.executable, "-m", "venv", environment)
    python = f"{environment}/bin/python"
    place.install(f"{environment}/bin/pip", "--only-binary", ":all:", *SYNAPSE)
    say(place.refuses(python).strip())
    place.install(f"{environment}/bin/pip", place.put(wheel))
    say(place.starts(python))


def new_python(place: Place, wheel: Path) -> None:
    """An environment whose system gets a newer Python, in the place of the old one.

    Raises:
        MissingError: there are no two to try it with.
    """
    pythons = list(interpreters([]).values())
    if len(pythons) < 2:
        raise MissingError("there is only one CPython of 3.10 or later")
    system = place.outside(place.home) / "system"
    system.mkdir()
    link = system / "python3"
    environment = f"{place.home}/venv"
    pip, python = f"{environment}/bin/pip", f"{environment}/bin/python"
    for time, program in (("the old Python", pythons[-2]), ("the new Python", pythons[-1])):
        link.unlink(missing_ok=True)
        link.symlink_to(program)
        if time == "the new Python":
            say(f"{time}: {_lacks_synapse(place, python)}")
        options = ("--upgrade",) if time == "the new Python" else ()
        place.run(str(link), "-m", "venv", *options, environment)
        place.install(pip, "--only-binary", ":all:", *SYNAPSE, place.put(wheel))
        say(f"{time}: {place.starts(python)}")


def _lacks_synapse(place: Place, python: str) -> str:
    """What starting Synapse says, where the environment finds nothing of what it had.

    Raises:
        StepError: it says something else.
    """
    try:
        place.run(python, "-m", "synapse.app.homeserver")
    except StepError as e:
        said = str(e).strip().splitlines()[-1]
        if said.endswith(LACKS_SYNAPSE):
            return said
        raise
    raise StepError("Synapse is found by the new Python")


def debian_package(place: Place, wheel: Path) -> None:
    """An environment at the place where Synapse's Debian package has it. It was made elsewhere and
    moved there, as that package is made. Then comes the next version of the package."""
    python = f"{_VENV}/bin/python"
    for time in ("installed", "upgraded"):
        _relocated(place)
        say(f"{time}: {place.refuses(python).strip()}")
        place.install(f"{_VENV}/bin/pip", "--no-deps", place.put(wheel))
        say(f"{time}: {place.starts(python)}")


def _relocated(place: Place) -> None:
    """What dh_virtualenv does: makes the environment, changes the paths in it, and moves it."""
    build = f"{place.home}/build{_VENV}"
    place.run(_SYSTEM, "-m", "venv", build)
    place.install(f"{build}/bin/pip", "--only-binary", ":all:", *SYNAPSE)
    made, target = place.outside(build), place.outside(_VENV)
    for file in (*(made / "bin").iterdir(), made / "pyvenv.cfg"):
        if not file.is_symlink() and file.is_file():
            content = file.read_bytes()
            file.write_bytes(content.replace(build.encode(), _VENV.encode()))
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(made, target)


def image(place: Place, wheel: Path) -> None:
    """A layer on Synapse's image, by the steps of the Dockerfile."""
    for marker in place.root.glob(_MARKER):
        marker.unlink()
    place.install("/usr/bin/pip", "--only-binary", ":all:", *SYNAPSE)
    say(place.refuses(_SYSTEM).strip())
    place.put(wheel)
    for command in steps(DOCKERFILE.read_text()):
        place.run("sh", "-c", command)
    say(place.starts(_SYSTEM))


def steps(dockerfile: str) -> list[str]:
    """The commands that a Dockerfile runs in its last stage.

    Raises:
        StepError: it has none.
    """
    last = dockerfile.rpartition("\nFROM ")[2]
    commands = re.findall(r"^RUN (.+)$", last.replace("\\\n", " "), re.MULTILINE)
    if not commands:
        raise StepError("the Dockerfile runs nothing")
    return commands
