"""docs/configuration.md, out of the options themselves: ``python -m tests.site.configuration``.

``--check`` fails if the page is not of these options.
"""

import inspect
import re
import sys
import textwrap
from enum import Enum
from pathlib import Path
from typing import Any

import attr

from synapse_sticky.config import StickyConfig

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "configuration.md"
ALL_OPTIONS = DOCS / "all-options.yaml"

_HEAD = """# Configuration reference

Everything stands under `config:` of the module in homeserver.yaml, and every option has a
default. A wrong option stops Synapse's start, and the error message names it. A changed
configuration applies after a restart of each process.

```yaml
modules:
  - module: synapse_sticky.StickyEventsModule
    config:
      federation:
        per_sender: {per_second: 1, burst_count: 30}
```

A duration is a whole number of milliseconds or a string such as `30s`, `5m` or `1h`. A limit is a
bucket: it holds `burst_count` events and refills at `per_second`, as everywhere in
homeserver.yaml; `null` switches it off.

This page is made from the code. [Choosing limits](limits.md) says what the limits mean, and [The
duties](duties.md) what each duty does.
"""

_END = """## All options, with their defaults

```yaml
{}```
"""

_ENTRY = re.compile(r"^(\w+): ", re.MULTILINE)
_WIDTH = 120
_UNITS_MS = (("h", 3_600_000), ("m", 60_000), ("s", 1_000))
_OLD = {"staging": "The name of 0.1.0: `keep_sticky: false` switches pruning and parking off."}


def page() -> str:
    """The whole page."""
    config = StickyConfig()
    top = [field for field in attr.fields(StickyConfig) if "check" in field.metadata]
    sections = [field for field in attr.fields(StickyConfig) if "section" in field.metadata]
    parts = [_HEAD, "## At the top\n", _table(StickyConfig, config, top)]
    plain = [field.name for field in sections if _is_plain(getattr(config, field.name))]
    names = ", ".join(f"`{name}`" for name in plain)
    text = f"{names} have `enabled` (true or false, by default true), and nothing else."
    parts.append(f"## Duties without options of their own\n\n{textwrap.fill(text, _WIDTH)}\n")
    for field in sections:
        if field.name not in plain:
            default = getattr(config, field.name)
            about = _OLD.get(field.name) or _about(type(default))
            parts.append(f"## {field.name}\n\n{about}\n")
            parts.append(_table(type(default), default, attr.fields(type(default))))
    parts.append(_END.format(ALL_OPTIONS.read_text()))
    return "\n".join(parts)


def _is_plain(section: Any) -> bool:
    return [field.name for field in attr.fields(type(section))] == ["enabled"]


def _docs(section: type) -> tuple[str, dict[str, str]]:
    """What the docstring says of the section, and of each option."""
    text = inspect.getdoc(section) or ""
    about, *entries = _ENTRY.split(text)
    options = dict(zip(entries[::2], entries[1::2], strict=True))
    return about, {name: " ".join(said.split()) for name, said in options.items()}


def _about(section: type) -> str:
    about, _ = _docs(section)
    return textwrap.fill(_sentence(" ".join(about.split())), _WIDTH)


def _table(section: type, default: Any, fields: Any) -> str:
    _, said = _docs(section)
    lines = ["| option | default | allowed | meaning |", "|---|---|---|---|"]
    for field in fields:
        name = field.name.removesuffix("_ms")
        value = _shown(field.name, getattr(default, field.name))
        meaning = said[field.name].rstrip(".")
        lines.append(f"| `{name}` | `{value}` | {_allowed(field)} | {_sentence(meaning)} |")
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    """In the words of homeserver.yaml."""
    text = text.replace("retry_min_ms", "retry_min").replace("None", "null")
    return f"{text[0].upper()}{text[1:]}"


def _allowed(field: Any) -> str:
    """What the check itself says to a value that nobody can mean."""
    if (limit := field.metadata.get("section")) is not None:
        return "; ".join(f"`{f.name}`: {_allowed(f)}" for f in attr.fields(type(limit)))
    try:
        field.metadata["check"](object())
    except ValueError as e:
        return str(e).split(", as a whole number of milliseconds")[0].replace("'", "`")
    raise AssertionError(f"{field.name} takes anything")


def _shown(name: str, value: Any) -> str:
    """The value as homeserver.yaml has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return str(list(value))
    if attr.has(type(value)):
        fields = attr.asdict(value, recurse=False).items()
        return "{" + ", ".join(f"{key}: {_shown(key, one)}" for key, one in fields) + "}"
    if name.endswith("_ms"):
        return next((f"{value // ms}{u}" for u, ms in _UNITS_MS if value % ms == 0), f"{value}")
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Writes the page, or checks it."""
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text() != page():
            sys.stderr.write(f"{PAGE.name} is stale: python -m tests.site.configuration\n")
            return 1
        return 0
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
