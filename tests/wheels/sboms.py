"""What the SBOMs of a wheel say: each is CycloneDX, and each part in it has a licence."""

import json
import zipfile
from pathlib import Path
from typing import Any

from tests.wheels import StepError

NAMED = {"synapse-sticky.cyclonedx.json": "pyo3", "page.cyclonedx.json": "preact"}
"""The SBOMs that a wheel has, and a part that each of them cannot lack."""


def named_parts(wheel: Path) -> list[str]:
    """Reads all SBOMs of a wheel. Gives their parts that are in what was built.

    Raises:
        StepError: an SBOM is missing, is not known, or is not as it must be.
    """
    with zipfile.ZipFile(wheel) as archive:
        texts = {
            Path(name).name: archive.read(name).decode()
            for name in archive.namelist()
            if ".dist-info/sboms/" in name
        }
    if set(texts) != set(NAMED):
        raise StepError(f"{wheel.name} has the SBOMs {', '.join(sorted(texts)) or 'none'}")
    return [part for name, text in sorted(texts.items()) for part in parts(name, text)]


def parts(name: str, text: str) -> list[str]:
    """The parts that an SBOM names, but not what only the build needed.

    Args:
        name: of the SBOM.
        text: the SBOM, JSON.

    Returns:
        Each with its version.

    Raises:
        StepError: CycloneDX's schema does not take it, a part lacks its licence or its digest, or
            the part that it cannot lack is missing.
    """
    # Only here, as what starts Synapse needs nothing of this.
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    bom = json.loads(text)
    schema = SchemaVersion.from_version(bom.get("specVersion", ""))
    if error := JsonStrictValidator(schema).validate_str(text):
        raise StepError(f"{name} is no CycloneDX {schema.to_version()}: {error}")
    components = bom.get("components", [])
    for component in (bom["metadata"]["component"], *components):
        if not _licensed(component):
            raise StepError(f"{name} does not say the licence of {component['name']}")
    if bare := [component["name"] for component in components if not component.get("hashes")]:
        raise StepError(f"{name} has no digest of {', '.join(bare)}")
    used = [component for component in components if component.get("scope") != "excluded"]
    if NAMED[name] not in {component["name"] for component in used}:
        raise StepError(f"{name} does not name {NAMED[name]}")
    return [f"{component['name']} {component['version']}" for component in used]


def _licensed(component: dict[str, Any]) -> bool:
    from cyclonedx.spdx import is_expression

    licences = component.get("licenses", [])
    return bool(licences) and all(is_expression(each.get("expression", "")) for each in licences)
