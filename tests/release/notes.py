"""What CHANGELOG says of a version."""

import re
from pathlib import Path

PROJECT = Path(__file__).parents[2]


class ReleaseError(Exception):
    """The release lacks something; the message says what."""


def version() -> str:
    """The version of Cargo.toml, which the wheel takes."""
    # Without tomllib, as 3.10 has none: the first `version = ` is the package's own.
    found = re.search(r'^version = "([^"]+)"$', (PROJECT / "Cargo.toml").read_text(), re.MULTILINE)
    if found is None:
        raise ReleaseError("Cargo.toml has no version")
    return found[1]


def section(title: str) -> str | None:
    """What stands under a heading of CHANGELOG; None if there is no such heading."""
    parts = re.split(r"^## +(.*)$", (PROJECT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    heads = zip(parts[1::2], parts[2::2], strict=True)
    texts = {head.split()[0]: text.strip() for head, text in heads}
    return texts.get(title)


def notes(tag: str) -> str:
    """The notes of the release of this tag.

    Raises:
        ReleaseError: the tag is not of this version, or CHANGELOG does not tell of it.
    """
    if tag != f"v{version()}":
        raise ReleaseError(f"the tag is {tag}, but Cargo.toml has the version {version()}")
    text = section(version())
    if not text:
        raise ReleaseError(f"CHANGELOG.md says nothing of {version()}")
    return text


def lacking() -> list[str]:
    """What stands against a release of what is here."""
    lacks = []
    if section("Unreleased"):
        lacks.append("CHANGELOG.md: what is under Unreleased has to go under its version")
    if not section(version()):
        lacks.append(f"CHANGELOG.md: it says nothing of {version()}")
    return lacks
