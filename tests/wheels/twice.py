"""Whether the same commit gives the same bytes."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.wheels import PROJECT, Platform, StepError, needed, run

# Two users: another folder, other rights for new files, another time zone.
_USERS = ((0o022, "a", "UTC"), (0o077, "b/with/a/longer/path", "Pacific/Auckland"))


def compare(platform: Platform) -> str:
    """Builds the platform's wheel and the sdist of the last commit in two clones.

    Raises:
        StepError: the bytes differ, or a build failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        one, other = (
            _built(platform, Path(folder) / name, umask, zone) for umask, name, zone in _USERS
        )
    if one != other:
        differ = sorted({name for name, _ in set(one.items()) ^ set(other.items())})
        raise StepError(f"two clones give other bytes for {', '.join(differ)}")
    return "two clones give " + ", ".join(
        f"{name} {digest[:16]}..." for name, digest in one.items()
    )


def _built(platform: Platform, folder: Path, umask: int, zone: str) -> dict[str, str]:
    """The digest of each file that was built."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    git = needed("git", "it makes the clones")
    clone = (git, "clone", "--quiet", str(PROJECT), str(folder))
    subprocess.run(clone, check=True, umask=umask)  # the files get their modes here
    out = folder / "out"
    command = (sys.executable, "-m", "tests.wheels", "build", platform.name, "sdist", "--out", out)
    env = {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
    run(command, cwd=folder, env={**env, "TZ": zone, "PYTHONPATH": ""}, timeout_s=4000)
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.iterdir())}
