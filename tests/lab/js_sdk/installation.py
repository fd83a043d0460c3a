"""Installs packages of npm beside the programs that use them, once for each package-lock.json."""

import fcntl
import functools
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

FOLDER = Path(__file__).parent
OLDEST_NODE = 20

_LONGEST_INSTALLATION_S = 300
# What npm says of files that are wrong, and not of a registry that is not to be had.
_OURS = {"EUSAGE", "EJSONPARSE", "EINTEGRITY"}


def tool(name: str) -> str | None:
    """The path of ``node`` or ``npm``; None if there is none."""
    return shutil.which(name)


@functools.cache
def missing(folder: Path = FOLDER) -> str | None:
    """Why what the folder's package-lock.json names is not to be had; None if it is installed by
    now. Without a folder: matrix-js-sdk."""
    node, npm = tool("node"), tool("npm")
    if node is None or npm is None:
        return "node or npm is missing"
    asked = [node, "--version"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < OLDEST_NODE:
        return f"it needs Node {OLDEST_NODE}, and this is {version}"
    with (folder / "package.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # tests run in several processes
        return install(npm, folder)


def install(npm: str, folder: Path) -> str | None:
    """Installs what the folder's package-lock.json names, unless it is there.

    Gives what npm says if that is not to be had.

    Raises:
        AssertionError: the files of the folder are wrong.
    """
    lock = folder / "package-lock.json"
    stamp = folder / "node_modules" / ".installed"  # git ignores it
    if stamp.exists() and stamp.read_text() == lock.read_text():
        return None
    command, limit_s = [npm, "ci"], _LONGEST_INSTALLATION_S
    try:
        run = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"npm ci took more than {limit_s} s"
    if run.returncode == 0:
        shutil.copy(lock, stamp)
        return None
    codes = re.findall(r"^npm error code (\w+)", run.stderr, re.MULTILINE)
    assert not _OURS.intersection(codes), f"npm ci failed:\n{run.stderr}"
    return "npm ci failed: " + textwrap.shorten(run.stderr.replace("npm error ", ""), 200)
