"""The documentation tells all options, as they are."""

from typing import Any

import attr
import pytest
import yaml

from synapse_sticky.config import StickyConfig, parse
from tests.site import configuration


def options() -> dict[str, Any]:
    read = yaml.safe_load(configuration.ALL_OPTIONS.read_text())
    (module,) = read["modules"]
    options: dict[str, Any] = module["config"]
    return options


def names(section: Any, path: str = "") -> set[str]:
    """Every option by its path, without those that only 0.1.0 had."""
    found = set()
    for field in attr.fields(type(section)):
        name = f"{path}{field.name.removesuffix('_ms')}"
        value = getattr(section, field.name)
        found |= names(value, f"{name}.") if attr.has(type(value)) else {name}
    return {name for name in found if not name.startswith("staging.")}


def told(values: dict[str, Any], path: str = "") -> set[str]:
    found = set()
    for name, value in values.items():
        is_section = isinstance(value, dict)
        found |= told(value, f"{path}{name}.") if is_section else {f"{path}{name}"}
    return found


def test_the_example_has_every_option_with_its_default() -> None:
    assert parse(options()) == StickyConfig()
    assert told(options()) == names(StickyConfig())


def test_the_reference_has_every_option_with_its_default() -> None:
    sections = {
        (lines := part.splitlines())[0]: lines for part in configuration.page().split("\n## ")
    }
    for name in names(StickyConfig()):
        section, _, option = name.rpartition(".")
        if option in {"per_second", "burst_count"}:
            section, _, option = section.rpartition(".")
        heading = section or "At the top"
        if heading in sections:
            rows = [line for line in sections[heading] if line.startswith(f"| `{option}` | `")]
            assert len(rows) == 1, name
        else:
            text = " ".join(sections["Duties without options of their own"])
            assert f"`{section}`" in text, name
    retry = "| `retry_max` | `5m` | a duration from 10 to 3600000 ms | The longest"
    assert any(line.startswith(retry) for line in sections["joins"])
    bucket = "| `per_sender` | `{per_second: 2, burst_count: 60}` |"
    assert any(line.startswith(bucket) for line in sections["federation"])


def test_an_option_without_a_description_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    described = StickyConfig.__doc__ or ""
    monkeypatch.setattr(StickyConfig, "__doc__", described.replace("strict: which", "which"))
    with pytest.raises(KeyError, match="strict"):
        configuration.page()


def test_a_stale_page_is_noticed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "configuration.md"
    monkeypatch.setattr(configuration, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["configuration", "--check"])
    page.write_text(configuration.page().replace("5m", "6m"))
    assert configuration.main() == 1
    monkeypatch.setattr("sys.argv", ["configuration"])
    assert configuration.main() == 0
    monkeypatch.setattr("sys.argv", ["configuration", "--check"])
    assert configuration.main() == 0
