"""The SBOMs of a wheel. `make wheels` looks at each wheel's own, also at that of the Rust core."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.wheels import PROJECT, StepError
from tests.wheels.sboms import named_parts, parts

_NAME = "page.cyclonedx.json"
_SHIPPED = PROJECT / "synapse_sticky" / "admin" / "page" / _NAME
_LOCK = PROJECT / "page" / "package-lock.json"


def _shipped() -> Any:
    return json.loads(_SHIPPED.read_text())


def test_the_page_s_sbom_names_what_is_in_it() -> None:
    locked = json.loads(_LOCK.read_text())["packages"]
    used = [name for name, package in locked.items() if name and not package.get("dev")]
    assert parts(_NAME, _SHIPPED.read_text()) == [
        f"{name.removeprefix('node_modules/')} {locked[name]['version']}" for name in used
    ]
    licences = _SHIPPED.with_name("LICENSES.txt").read_text()
    for component in _shipped()["components"]:
        (licence,) = component["licenses"]
        assert f"{component['name']} {component['version']} ({licence['expression']})" in licences


def _unknown_kind(bom: Any) -> None:
    bom["components"][0]["type"] = "thing"


def _unlicensed(bom: Any) -> None:
    del bom["components"][0]["licenses"]


def _own_words(bom: Any) -> None:
    bom["components"][0]["licenses"] = [{"expression": "free for all"}]


def _no_digest(bom: Any) -> None:
    del bom["components"][0]["hashes"]


def _another_part(bom: Any) -> None:
    bom["components"][0]["name"] = "react"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_unknown_kind, r"no CycloneDX 1\.5.*thing"),
        (_unlicensed, "licence of preact"),
        (_own_words, "licence of preact"),
        (_no_digest, "no digest of preact"),
        (_another_part, "does not name preact"),
    ],
)
def test_an_sbom_that_lacks_something_is_found(spoil: Any, said: str) -> None:
    bom = _shipped()
    spoil(bom)
    with pytest.raises(StepError, match=said):
        parts(_NAME, json.dumps(bom))


def test_a_wheel_that_lacks_an_sbom_is_found(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(_SHIPPED, f"synapse_sticky-1.dist-info/sboms/{_NAME}")
    with pytest.raises(StepError, match=rf"has the SBOMs {_NAME}$"):
        named_parts(wheel)
