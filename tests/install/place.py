"""Where Synapse is installed: a folder of this machine, or a Debian of its own."""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.lab.postgres import Postgres
from tests.lab.workers import Valkey
from tests.wheels import MissingError, network_settings, run

_PROGRAM = Path(__file__).parents[1] / "wheels" / "started.py"
SYNAPSE = ("matrix-synapse[redis]>=1.163", "psycopg2-binary")
"""With what its Debian package and its image bring for workers; psycopg2 itself has no wheel."""
_PACKAGES = "ca-certificates,python3,python3-venv,python3-pip"
# Whoever runs Synapse there: nobody who may install anything.
_USER = "65534:65534"


_made: list[str] = []


@atexit.register
def _remove_what_came_back() -> None:
    """The wheel that brings Postgres leaves a file beside its data as Python ends. This is told
    before that wheel is imported, and so it is done after that."""
    for name in _made:
        shutil.rmtree(name, ignore_errors=True)


class Place:
    """A root folder to work in; ``/`` for this machine's own.

    Args:
        root: the folder.
        home: a folder in it, by its name there, that everybody may write to.
    """

    def __init__(self, root: Path, home: str) -> None:
        self.root = root
        self.home = home

    def outside(self, path: str) -> Path:
        """A path in it, as seen from this machine."""
        return self.root / path.lstrip("/")

    def put(self, file: Path) -> str:
        """Copies a file into its home. Gives its path there."""
        shutil.copy(file, self.outside(self.home))
        return f"{self.home}/{file.name}"

    def run(
        self,
        *command: str,
        as_user: bool = False,
        path: str = "",
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Runs a program there, with nothing of this machine's environment.

        Raises:
            StepError: it failed.
        """
        words = command
        if self.root != Path("/"):
            user = ("--userspec", _USER) if as_user else ()
            # By its whole name: the PATH is that of the place.
            words = (shutil.which("chroot") or "chroot", *user, str(self.root), *command)
        known = {"PATH": path or "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        return run(
            words, env={**known, "HOME": self.home, **(env or {})}, cwd=self.outside(self.home)
        )

    def install(self, pip: str, *words: str) -> None:
        """``pip install``, by this machine's way to the registries."""
        env = network_settings()
        if self.root == Path("/"):
            cache = os.environ.get("PIP_CACHE_DIR") or str(Path.home() / ".cache" / "pip")
            env["PIP_CACHE_DIR"] = cache
        command = (pip, "install", "--quiet", "--disable-pip-version-check")
        self.run(*command, *words, env=env)

    def starts(self, python: str) -> str:
        """Starts Synapse there, alone and with a worker, and sends sticky events."""
        program = self.put(_PROGRAM)
        path = str(Path(python).parent)
        said = [self.run(python, "-I", program, as_user=True, path=path)]
        with self._shared() as shared:
            words = (python, "-I", program, json.dumps(shared))
            said.append(self.run(*words, as_user=True, path=path))
        return "; ".join(line.strip() for line in said)

    def refuses(self, python: str) -> str:
        """Starts Synapse there, which lacks the module. Gives what it says."""
        path = str(Path(python).parent)
        return self.run(python, "-I", self.put(_PROGRAM), "refused", as_user=True, path=path)

    @contextmanager
    def _shared(self) -> Iterator[dict[str, Any]]:
        """A Postgres and a Valkey whose sockets are in its home."""
        home = self.outside(self.home)
        before, tempfile.tempdir = tempfile.tempdir, str(home)
        try:
            with ExitStack() as stack:
                postgres = stack.enter_context(Postgres())
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                folder.chmod(0o755)
                valkey = Valkey(folder)
                stack.callback(valkey.close)
                valkey.path.chmod(0o777)
                database = postgres.new_database()
                # Postgres lets its own user alone in there, and looks at that at its start.
                sockets = Path(database["args"]["host"])
                sockets.chmod(0o755)
                database["args"]["host"] = self._inside(sockets)
                redis = {"enabled": True, "path": self._inside(valkey.path)}
                yield {"database": database, "redis": redis}
        finally:
            tempfile.tempdir = before

    def _inside(self, path: Path) -> str:
        return "/" + str(path.relative_to(self.root))


@contextmanager
def here() -> Iterator[Place]:
    """A folder of this machine."""
    with tempfile.TemporaryDirectory(prefix="install-") as name:
        _made.append(name)
        yield Place(Path("/"), name)


@contextmanager
def debian(release: str, kept: Path) -> Iterator[Place]:
    """A Debian with Python alone, made once in the folder ``kept``, and copied.

    Raises:
        MissingError: it needs root, and debootstrap.
        StepError: it cannot be made.
    """
    if os.getuid() or shutil.which("debootstrap") is None:
        raise MissingError("a Debian of its own needs root and Debian's debootstrap")
    base = kept / release
    if not (base / "complete").exists():
        shutil.rmtree(base, ignore_errors=True)
        kept.mkdir(parents=True, exist_ok=True)
        options = ("--variant=minbase", f"--include={_PACKAGES}")
        run(("debootstrap", *options, release, base), timeout_s=3600)
        (base / "complete").touch()
    with tempfile.TemporaryDirectory(prefix="install-") as name:
        _made.append(name)
        Path(name).chmod(0o755)
        root = Path(name) / "r"
        run(("cp", "-a", base, root))
        # Its way to the registries is this machine's.
        shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
        bundles = {v for k, v in network_settings().items() if k.endswith(("_CERT", "_FILE"))}
        for bundle in filter(os.path.isfile, bundles):
            there = root / bundle.lstrip("/")
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(bundle, there)
        yield Place(root, "/tmp")  # noqa: S108  of its own
