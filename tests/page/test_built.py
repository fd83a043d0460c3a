"""The page that is shipped is the one that its sources give, byte by byte."""

import subprocess
from pathlib import Path

import pytest

from tests.lab.js_sdk.installation import missing, tool
from tests.page.browser import SOURCES

SHIPPED = Path(__file__).parents[2] / "synapse_sticky" / "admin" / "page"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_shipped_page_is_the_built_one(tmp_path: Path) -> None:
    if (reason := missing(SOURCES)) is not None:
        pytest.skip(f"what builds the page is not to be had: {reason}")
    subprocess.run([tool("node") or "", SOURCES / "build.mjs", tmp_path], check=True)
    assert contents(tmp_path) == contents(SHIPPED), "make page"


def test_no_shipped_file_names_another_host() -> None:
    for name, text in contents(SHIPPED).items():
        for scheme in (b"http:", b"https:", b"//# source"):
            # The names of XML's vocabularies, which nobody asks for.
            left = text.replace(b"http://www.w3.org/", b"")
            assert scheme not in left or name == "LICENSES.txt", name
