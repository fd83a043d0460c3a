"""``synapse-sticky check`` where it cannot go on: no traceback, and not the exit code of a Synapse
that starts (H5)."""

import json
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

import pytest
from synapse.util.module_loader import load_module

import synapse_sticky
from synapse_sticky import module
from synapse_sticky.cli import base, main

pytestmark = pytest.mark.requirement("H5")


def test_a_synapse_without_the_metadata_of_its_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It starts all the same, and so does the module."""
    look_up = Distribution.from_name

    def from_name(name: str) -> Distribution:
        if name == "matrix-synapse":
            raise PackageNotFoundError(name)
        return look_up(name)

    monkeypatch.setattr(Distribution, "from_name", from_name)
    assert main(["check"]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith(" with Synapse of an unknown version")


@pytest.mark.parametrize("gone", ["synapse.module_api", "synapse.module_api.errors"])
def test_a_synapse_that_cannot_load_the_module(tmp_path: Path, gone: str) -> None:
    changed = tmp_path / "changed.py"
    changed.write_text(
        "import sys\n"
        f"sys.modules[{gone!r}] = None\n"
        "from synapse_sticky.cli import main\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, str(changed), "check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    stop = f"it cannot load synapse_sticky.StickyEventsModule: import of {gone} halted"
    assert f"Synapse would not start: {stop}" in run.stdout
    assert (run.returncode, run.stderr) == (2, "")
    run = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    found = json.loads(run.stdout)
    assert found["stops"][0].startswith(stop)
    assert (run.returncode, found["exit_code"]) == (2, 2)


def test_anything_else_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(paths: list[str], *, as_json: bool) -> int:
        raise RuntimeError("nobody thought of\nthis")

    monkeypatch.setattr(base, "check", failing)
    assert main(["check"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "synapse-sticky check itself failed: RuntimeError: nobody thought of this\n"
    )


def test_the_class_is_there_once_it_is_asked_for() -> None:
    loaded, _ = load_module({"module": "synapse_sticky.StickyEventsModule"}, ())
    assert loaded is synapse_sticky.StickyEventsModule is module.StickyEventsModule
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = synapse_sticky.no_such_name  # type: ignore[attr-defined]
