"""docs/conformance.md, out of what was recorded: ``python -m tests.conformance.page [--check]``.

``--check`` fails if a requirement has no test, or if the page or the record is not of these tests.
"""

import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from tests.conformance.requirements import REQUIREMENTS

_FOLDER = Path(__file__).parent
_RESULTS = _FOLDER / "results.json"
_PAGE = _FOLDER.parents[1] / "docs" / "conformance.md"
UNTOLD = {"plain": {"D8", "H1", "H2", "H3", "H4", "H5", "H6"}}
"""The requirements that a variant is not tested for."""

_HEAD = """# Conformance

This page lists what MSC4354 asks of a homeserver, and which of it plain Synapse (with its
experimental `msc4354_enabled`) and Synapse with this module do. The module has its default options
unless a sentence names another. Tests in `tests/conformance` show each line. They use only the
client-server API, the federation API and, for E3, H5 and H6, the listener for metrics. The servers
on the other side are peers that can send anything. A run of these tests generates this page.

H1 to H7 are not in MSC4354. They say that the module harms nobody, so plain Synapse is not asked
about H1 to H6. `make bench` measures what the module costs.

"""
_TAIL = """
"partly" means that some tests of the line pass. The tests named here do not. An empty cell means
that the line is not tested there.

```
make conformance          # Synapse with the module
make conformance-plain    # plain Synapse
.venv/bin/python -m pytest tests/conformance --homeserver URL --federation-port PORT
```

The last command tests a homeserver that already runs on this machine. Anybody must be able to
register there, and its limits on registration and messages must be high. It must federate with
127.0.0.1 and not check certificates. Tests that need a certain configuration, or that kill the
server, are skipped.
"""


def tests() -> dict[str, tuple[list[str], str]]:
    """The tests by ``file::name``: the requirements that each shows, and a digest of its lines."""
    found = {}
    for path in sorted(_FOLDER.glob("test_*.py")):
        source = path.read_text()
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                # Not of the parsed tree, which each version of Python writes in its own way.
                first = min(node.lineno, *(decorator.lineno for decorator in node.decorator_list))
                text = "\n".join(lines[first - 1 : node.end_lineno])
                digest = hashlib.sha256(text.encode()).hexdigest()[:16]
                found[f"{path.name}::{node.name}"] = (_ids(node), digest)
    return found


def _ids(node: ast.FunctionDef) -> list[str]:
    return [
        argument.value
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("requirement")
        for argument in decorator.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    ]


def record(variant: str, synapse: str, outcomes: dict[str, str]) -> None:
    """Records a run: the outcomes by ``file::name[parameters]``.

    A run of some tests adds to what was recorded with the same Synapse, and replaces the outcomes
    of these tests. A test that has changed since and was not run stays recorded as it was.
    """
    # Synapse puts the branch and commit of the folder that it runs in behind its version.
    synapse = synapse.split(maxsplit=1)[0]
    results = _read()
    before = results.get(variant)
    if before is None or before["synapse"] != synapse:
        before = {"tests": {}, "outcomes": {}}
    now = tests()
    were_run = {_test_of(name) for name in outcomes}
    untold = set(UNTOLD.get(variant, ()))
    digests = {
        # This variant is not asked about some requirements.
        name: digest if name in were_run or untold & {*ids} else before["tests"].get(name)
        for name, (ids, digest) in now.items()
    }
    others = {
        name: outcome
        for name, outcome in before["outcomes"].items()
        if (test := _test_of(name)) in now and test not in were_run and not untold & {*now[test][0]}
    }
    results[variant] = {
        "synapse": synapse,
        "tests": {name: digest for name, digest in digests.items() if digest is not None},
        "outcomes": dict(sorted({**others, **outcomes}.items())),
    }
    _RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def _test_of(name: str) -> str:
    return name.split("[", maxsplit=1)[0]


def _read() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    return results


def _cell(variant: str, of_run: dict[str, Any], requirement: str) -> tuple[str, list[str]]:
    """What to say of a requirement, and which of its tests failed."""
    if requirement in UNTOLD.get(variant, ()):
        return "", []
    names = [name for name, (ids, _) in tests().items() if requirement in ids]
    outcomes = {
        name: outcome for name, outcome in of_run["outcomes"].items() if name.split("[")[0] in names
    }
    failed = [name for name, outcome in outcomes.items() if outcome != "passed"]
    if not outcomes:
        return "not tried", []
    if not failed:
        return "yes", []
    return ("**no**" if len(failed) == len(outcomes) else "partly"), failed


def render(results: dict[str, Any]) -> str:
    """The page."""
    plain, module = results["plain"], results["module"]
    lines = [
        f"| | requirement | plain {plain['synapse']} | with the module, {module['synapse']} |",
        "|---|---|---|---|",
    ]
    partly: list[str] = []
    for requirement, sentence in REQUIREMENTS.items():
        cells = []
        for variant, run in (("plain", plain), ("module", module)):
            cell, failed = _cell(variant, run, requirement)
            cells.append(cell)
            if cell == "partly":
                where = "plain" if variant == "plain" else "with the module"
                listed = ", ".join(f"`{name.split('::')[1]}`" for name in failed)
                partly.append(f"- {requirement}, {where}: {listed}")
        lines.append(f"| {requirement} | {sentence} | {cells[0]} | {cells[1]} |")
    tail = _TAIL
    if partly:
        tail = tail.replace("\n\n```", "\n\n" + "\n".join(partly) + "\n\n```", 1)
    return _HEAD + "\n".join(lines) + "\n" + tail


def problems() -> list[str]:
    """Why the page is not to be believed."""
    known = tests()
    shown = {i for ids, _ in known.values() for i in ids}
    found = [f"{i} has no test in tests/conformance" for i in REQUIREMENTS if i not in shown]
    found += [f"{i} is no requirement" for i in sorted(shown - REQUIREMENTS.keys())]
    results = _read()
    digests = {name: digest for name, (_, digest) in known.items()}
    for variant, target in (("module", "conformance"), ("plain", "conformance-plain")):
        if variant not in results:
            return [*found, f"nothing is recorded: make {target}"]
        stale = {
            name
            for name in digests.keys() | results[variant]["tests"].keys()
            if digests.get(name) != results[variant]["tests"].get(name)
        }
        if stale:
            found.append(f"changed since it was recorded, make {target}: {', '.join(stale)}")
    if not _PAGE.exists() or _PAGE.read_text() != render(results):
        found.append("docs/conformance.md is stale: python -m tests.conformance.page")
    return found


def main() -> None:
    """Writes the page, or checks it."""
    if "--check" in sys.argv[1:]:
        sys.exit("\n".join(problems()) or 0)
    _PAGE.write_text(render(_read()))


if __name__ == "__main__":
    main()
