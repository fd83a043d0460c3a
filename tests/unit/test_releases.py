"""The parts of building and releasing that need no compiler and no registry."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from tests.install.ways import DOCKERFILE, LACKS_SYNAPSE, steps
from tests.release.dry import unpinned
from tests.release.notes import ReleaseError, notes, section, version
from tests.wheels import PLATFORMS, PROJECT, StepError
from tests.wheels.build import _finished, chosen
from tests.wheels.prove import interpreters
from tests.wheels.sboms import CORE
from tests.wheels.started import LACKS, five_lines

_SBOM = f"synapse_sticky-1.dist-info/sboms/{CORE}"
_PART = {"bom-ref": "linked@1"}
_RECORD = "synapse_sticky-1.dist-info/RECORD"


def _wheel(folder: Path, built_in: str, mode: int) -> Path:
    """What maturin gives to a user whose folder and umask are these."""
    core = f"path+file://{built_in}#it"
    sbom = {
        "metadata": {"component": {"bom-ref": core}},
        "components": [],
        "dependencies": [{"ref": core}],
    }
    wheel = folder / "built.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in (
            ("synapse_sticky/a.py", "pass\n"),
            (_SBOM, json.dumps(sbom)),
            (_RECORD, f"synapse_sticky/a.py,sha256=x,5\n{_SBOM},sha256=old,1\n{_RECORD},,\n"),
        ):
            entry = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))
            entry.external_attr = mode << 16
            archive.writestr(entry, text)
    return wheel


def test_a_wheel_does_not_tell_who_built_it(tmp_path: Path) -> None:
    digests = set()
    for built_in, mode in (("/home/a/clone", 0o100644), ("/b", 0o100600)):
        wheel = _wheel(tmp_path, built_in, mode)
        done = _finished(wheel, tmp_path / "done.whl", PLATFORMS[0], Path(built_in), [_PART])
        digests.add(hashlib.sha256(done.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_record_tells_of_what_was_changed(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, "/b", 0o644)
    done = _finished(wheel, tmp_path / "d.whl", PLATFORMS[0], Path("/b"), [_PART])
    with zipfile.ZipFile(done) as archive:
        lines = archive.read(_RECORD).decode().splitlines()
        size = len(archive.read(_SBOM))
        sbom = json.loads(archive.read(_SBOM))
    core = "path+file:///synapse-sticky#it"
    assert sbom["components"] == [_PART]
    assert sbom["dependencies"] == [{"ref": core, "dependsOn": ["linked@1"]}, {"ref": "linked@1"}]
    assert lines[0] == "synapse_sticky/a.py,sha256=x,5"
    assert lines[1].startswith(f"{_SBOM},sha256=")
    assert lines[1].endswith(f",{size}")
    assert "old" not in lines[1]


def test_an_unknown_platform_is_named() -> None:
    assert chosen([]) == list(PLATFORMS)
    with pytest.raises(StepError, match=r"windows.*manylinux-x86_64"):
        chosen(["windows"])


def test_an_interpreter_of_no_use_is_named() -> None:
    with pytest.raises(StepError, match="no-such-python"):
        interpreters(["no-such-python"])


def test_the_steps_of_the_image_are_those_of_the_dockerfiles() -> None:
    """So that what make test-install does is what both images do."""
    (step,) = steps(DOCKERFILE.read_text())
    assert step.startswith("pip install --no-cache-dir --no-deps /tmp/synapse_sticky-")
    (other,) = steps(DOCKERFILE.with_name("Dockerfile.build").read_text())
    assert other == step.replace('*manylinux_2_17_"$(uname -m)".whl', "*.whl")
    with pytest.raises(StepError, match="runs nothing"):
        steps("FROM scratch\n")


def test_what_is_said_without_the_module_is_what_synapse_says() -> None:
    """make test-install has Synapse end with it, in each way to install."""
    install = (PROJECT / "docs" / "install.md").read_text()
    assert f"```\n{LACKS}\n```" in install
    assert f"`{LACKS}`" in (PROJECT / "docs" / "troubleshooting.md").read_text()
    assert f"`{LACKS_SYNAPSE}`" in install
    # The one command after a new Python is what tests/install/ways.py runs.
    assert "`python3 -m venv --upgrade ENV && ENV/bin/pip install matrix-synapse WHEEL`" in install


def test_the_readme_shows_five_lines() -> None:
    """make wheels-check starts Synapse with them, as they are in the installed module."""
    assert "Five lines of homeserver.yaml" in (PROJECT / "README.md").read_text()
    assert five_lines((PROJECT / "README.md").read_text()).count("\n") == 5
    with pytest.raises(SystemExit, match="five lines"):
        five_lines("```yaml\nmodules:\n```\n")


def test_the_notes_are_those_of_the_version() -> None:
    assert notes(f"v{version()}") == section(version())
    with pytest.raises(ReleaseError, match=r"Cargo\.toml has the version"):
        notes("v99.0.0")


def test_every_action_is_pinned_by_its_commit() -> None:
    assert not unpinned()


def test_every_job_has_few_rights_and_an_end() -> None:
    for path in (PROJECT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        assert "\npermissions: {}\n" in text, path
        jobs = text.count("runs-on:")
        assert text.count("timeout-minutes:") == jobs, path
