"""matrix-js-sdk is installed, or it is said why not. If our files are wrong, that is no excuse."""

import json
import shutil
from pathlib import Path

import pytest

from tests.lab.js_sdk.installation import FOLDER, install, tool


@pytest.fixture
def npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """npm without anything that it had got before, and with a registry that refuses."""
    path = tool("npm")
    if path is None:
        pytest.skip("npm is missing")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that say what is to be installed."""
    (folder := tmp_path / "sdk").mkdir()
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(FOLDER / name, folder)
    return folder


def test_a_registry_that_cannot_be_reached(npm: str, folder: Path) -> None:
    said = install(npm, folder)
    assert said is not None
    assert "ECONNREFUSED" in said


def test_files_that_are_wrong(npm: str, folder: Path) -> None:
    (folder / "package.json").write_text("{")
    with pytest.raises(AssertionError, match="EJSONPARSE"):
        install(npm, folder)


def test_what_is_installed_needs_no_registry(npm: str, folder: Path) -> None:
    (folder / "node_modules").mkdir()
    shutil.copy(folder / "package-lock.json", folder / "node_modules" / ".installed")
    assert install(npm, folder) is None


def test_no_file_names_a_registry() -> None:
    lock = json.loads((FOLDER / "package-lock.json").read_text())
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]
