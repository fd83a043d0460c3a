"""What can be said of a wheel without running it."""

import json
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tests.wheels import PROJECT, Platform, StepError, run
from tests.wheels.sboms import named_parts

_CORE = "synapse_sticky/_core.abi3.so"
_MOST_KIB = 1024  # as docs/install.md says
# The C library under the names of its parts. All else would have to be bundled.
_LIBC = ("libc.so", "libpthread.so", "libdl.so", "libm.so", "librt.so", "ld-linux-", "libc.musl-")


def described(file: Path) -> str:
    """The name and size of what was built."""
    return f"{file.name}, {file.stat().st_size / 1024:.0f} KiB"


def find(platform: Platform, wheels: Sequence[Path]) -> Path:
    """The platform's wheel.

    Raises:
        StepError: there is not exactly one.
    """
    arch = platform.name.partition("-")[2]
    found = [w for w in wheels if w.name.endswith(f"{platform.tag}_{arch}.whl")]
    if len(found) != 1:
        raise StepError(f"there are {len(found)} wheels for {platform.name}, not one: make wheels")
    return found[0]


def audited(platform: Platform, wheels: Sequence[Path]) -> str:
    """Looks at the platform's wheel: its ABI, what it needs of the system, what is in it.

    Raises:
        StepError: something is not as it must be.
    """
    wheel = find(platform, wheels)
    if "-cp310-abi3-" not in wheel.name:
        raise StepError(f"{wheel.name} is not for every CPython from 3.10 on")
    if wheel.stat().st_size > _MOST_KIB * 1024:
        raise StepError(f"{described(wheel)}, is larger than docs/install.md says")
    needs = _contents(wheel)
    with tempfile.TemporaryDirectory() as nothing:
        # It is not to look at this machine's libraries, which may be of another kind.
        shown = run((sys.executable, "-m", "auditwheel", "show", "--ldpaths", nothing, wheel))
    arch = platform.name.partition("-")[2]
    if f'platform tag: "{platform.tag}_{arch}"' not in " ".join(shown.split()):
        raise StepError(f"auditwheel does not find it as its name says:\n{shown}")
    _abi3(wheel)
    return (
        f"{described(wheel)}; needs {', '.join(needs)}; auditwheel and abi3audit find it in order;"
        f" its SBOMs name {', '.join(named_parts(wheel))}"
    )


def _abi3(wheel: Path) -> None:
    """abi3audit, with what it says as JSON: its exit code alone would hide that it saw nothing."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        run((sys.executable, "-m", "abi3audit", "--strict", "--report", "-o", output, wheel))
        report = json.loads(output.read_text())
    (spec,) = report["specs"].values()
    results = [scanned["result"] for scanned in spec["wheel"]]
    if len(results) != 1 or not all(result["is_abi3"] for result in results):
        raise StepError(f"abi3audit finds: {results}")


def _contents(wheel: Path) -> list[str]:
    """Looks into it. Gives the libraries that the core needs.

    Raises:
        StepError: something is missing, or something is in it that must not be.
    """
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        contents = {name: archive.read(name) for name in names}
        needs = needed_libraries(Path(archive.extract(_CORE, folder)))
    page = [
        f"synapse_sticky/admin/page/{file}" for file in ("index.html", "page.js", "LICENSES.txt")
    ]
    for end in ("synapse_sticky/py.typed", "/licenses/LICENSE", *page):
        if not any(name.endswith(end) for name in names):
            raise StepError(f"{wheel.name} has no {end}")
    if others := [n for n in names if not n.startswith(("synapse_sticky/", "synapse_sticky-"))]:
        raise StepError(f"{wheel.name} also has {', '.join(others)}")
    no_panics(wheel)
    for folder_here in (PROJECT, Path.home()):
        told = [n for n, content in contents.items() if f"{folder_here}/".encode() in content]
        if told and folder_here != Path("/"):
            raise StepError(f"{wheel.name} names {folder_here} in {', '.join(told)}")
    if strange := [library for library in needs if not library.startswith(_LIBC)]:
        raise StepError(f"{wheel.name} needs {', '.join(strange)} of the system")
    return needs


def no_panics(wheel: Path) -> None:
    """Looks for what only Cargo's feature ``panics`` has.

    Raises:
        StepError: it is there.
    """
    with zipfile.ZipFile(wheel) as archive:
        if b"_panic_in" in archive.read(_CORE):
            raise StepError(f"{wheel.name} was built with the feature `panics`")


def needed_libraries(file: Path) -> list[str]:
    """The shared libraries that an ELF file names."""
    # Only here, as the tests' own environment does not have it.
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile

    with file.open("rb") as stream:
        dynamic = ELFFile(stream).get_section_by_name(".dynamic")
        if not isinstance(dynamic, DynamicSection):
            raise StepError(f"{file.name} is no shared library")
        return [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]
