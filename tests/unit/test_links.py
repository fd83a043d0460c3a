"""The links of the pages that are not in the documentation site, which `make docs` looks at."""

import re
from pathlib import Path

import pytest

from tests.wheels import PROJECT

_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def _headings(page: Path) -> set[str]:
    """As GitHub names them in a link."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", lines, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", _PAGES)
def test_each_link_leads_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]+))?\)", (PROJECT / name).read_text())
    assert links
    for path, heading in links:
        target = PROJECT / (path or name)
        assert target.exists(), path
        assert not heading or heading in _headings(target), f"{path}#{heading}"
