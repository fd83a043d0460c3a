"""A browser on the page for administrators."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Client
from tests.lab.js_sdk.installation import missing, tool

SOURCES = Path(__file__).parents[2] / "page"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browse(what: str, admin: Client, **given: Any) -> Any:
    """Does it on the page of the administrator's server. Gives what browse.mjs says of it.

    Args:
        given: what browse.mjs needs to know beside the page's address and the token.

    Raises:
        AssertionError: what browse.mjs has found.
    """
    if (reason := missing(SOURCES)) is not None:
        pytest.skip(f"the browser's driver is not to be had: {reason}")
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)}")
    url = f"{admin.base_url}/_synapse/sticky/"
    known = {"chromium": chromium, "url": url, "token": admin.access_token, **given}
    run = subprocess.run(
        [tool("node") or "", str(Path(__file__).parent / "browse.mjs"), what],
        input=json.dumps(known),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
