"""Runs Synapse's own tests of sticky events with the module: ``python -m tests.suite``.

They come with the source of the Synapse that is installed, which pip fetches, and what they need
besides. Further arguments go to pytest; without any, these are the tests of the sections in sliding
sync and in /sync.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from synapse_sticky.versions import synapse_version

PROJECT = Path(__file__).parents[2]
_SLIDING = "tests/rest/client/sliding_sync/test_extension_sticky_events.py"
_SYNC = "tests/rest/client/test_sync_sticky_events.py"
_NEEDED = "parameterized>=0.9.0"  # as Synapse has it


def main(arguments: list[str]) -> int:
    """What pytest ends with."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = f"matrix-synapse=={synapse_version()}"
        pip = [sys.executable, "-m", "pip", "--quiet"]
        source_of = ["download", "--no-deps", "--no-binary", "matrix-synapse", "--dest"]
        subprocess.run([*pip, *source_of, str(folder), wanted], check=True)
        needed = folder / "needed"
        subprocess.run([*pip, "install", "--target", str(needed), _NEEDED], check=True)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as source:
            for member in source.getmembers():
                # The tests only: the rest is installed.
                _, _, path = member.name.partition("/")
                if path.startswith("tests/"):
                    member.name = path
                    source.extract(member, folder, filter="data")
        # The package of this name here has the plugin by its file's name only.
        places = [folder, PROJECT / "tests" / "suite", PROJECT, needed]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
        pytest = [sys.executable, "-m", "pytest", "-p", "with_module", "-p", "no:cacheprovider"]
        tests = arguments or [_SLIDING, _SYNC]
        return subprocess.run(
            [*pytest, *tests], cwd=folder, env=environment, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
