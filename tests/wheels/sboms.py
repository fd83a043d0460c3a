"""What the SBOMs of a wheel say: each is CycloneDX, and each part in it has a licence."""

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

from tests.wheels import StepError, needed, run

CORE = "synapse-sticky.cyclonedx.json"
"""The one that maturin makes, of the Rust core."""
NAMED = {
    CORE: {"pyo3", "rust-std", "llvm-libunwind"},
    "page.cyclonedx.json": {"preact"},
}
"""The SBOMs that a wheel has, and the parts that each of them cannot lack."""


def linked() -> list[dict[str, Any]]:
    """What the tools link into the core, which no lock file names: components for its SBOM.

    Raises:
        StepError: a tool is not there.
    """
    rust = run((needed("rustc", "it builds the core"), "--version")).split()[1]
    zig = run((sys.executable, "-m", "ziglang", "cc", "--version"))
    clang = re.search(r"clang version ([\d.]+)", zig)
    if clang is None:
        raise StepError(f"zig does not say the version of its LLVM: {zig}")
    return [
        _library("rust-std", rust, "Rust's standard library", "MIT OR Apache-2.0"),
        _library(
            "llvm-libunwind",
            clang[1],
            "What unwinds the stack after a panic, as zig brings it",
            "Apache-2.0 WITH LLVM-exception",
        ),
    ]


def _library(name: str, version: str, description: str, licence: str) -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": f"{name}@{version}",
        "name": name,
        "version": version,
        "description": description,
        "scope": "required",
        "licenses": [{"expression": licence}],
    }


def with_linked(text: str, components: list[dict[str, Any]]) -> str:
    """The core's SBOM, with these components of the core."""
    bom = json.loads(text)
    core = bom["metadata"]["component"]["bom-ref"]
    bom["components"] += components
    for known in bom["dependencies"]:
        if known["ref"] == core:
            known["dependsOn"] = known.get("dependsOn", []) + [c["bom-ref"] for c in components]
    bom["dependencies"] += [{"ref": component["bom-ref"]} for component in components]
    return json.dumps(bom, indent=2)


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
        StepError: CycloneDX's schema does not take it, a part lacks its licence, one from a
            registry lacks its digest, or a part that it cannot lack is missing.
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
    if bare := [c["name"] for c in components if "purl" in c and not c.get("hashes")]:
        raise StepError(f"{name} has no digest of {', '.join(bare)}")
    used = [component for component in components if component.get("scope") != "excluded"]
    if missing := NAMED[name] - {component["name"] for component in used}:
        raise StepError(f"{name} does not name {', '.join(sorted(missing))}")
    return [f"{component['name']} {component['version']}" for component in used]


def _licensed(component: dict[str, Any]) -> bool:
    from cyclonedx.spdx import is_expression

    licences = component.get("licenses", [])
    return bool(licences) and all(is_expression(each.get("expression", "")) for each in licences)
