"""The files of the page for administrators: where they are answered, with which headers (E3)."""

import hashlib
from typing import Any

import pytest
import requests

from synapse_sticky.admin.listeners.page import HEADERS
from tests.conftest import Servers
from tests.lab import Lab
from tests.lab.workers import MAIN, SLIDING_SYNC, SYNC, UnixConnection

PATH = "/_synapse/sticky"
KINDS = {
    "/": "text/html; charset=utf-8",
    "/page.js": "text/javascript; charset=utf-8",
    "/page.css": "text/css; charset=utf-8",
    "/icon.svg": "image/svg+xml",
    "/LICENSES.txt": "text/plain; charset=utf-8",
}

pytestmark = pytest.mark.requirement("E3")


def ask(url: str, method: str = "GET", **options: Any) -> requests.Response:
    return requests.request(method, url, timeout=60, verify=False, **options)  # noqa: S501  # the lab's


def unknown(response: requests.Response, status: int = 404) -> bool:
    return response.status_code == status and response.json()["errcode"] == "M_UNRECOGNIZED"


def test_the_policy_allows_nothing_from_elsewhere_and_nothing_inline() -> None:
    policy = dict(
        rule.strip().split(" ", 1) for rule in HEADERS["Content-Security-Policy"].split(";")
    )
    assert policy.pop("require-trusted-types-for") == "'script'"
    for name in ("script-src", "style-src", "connect-src", "img-src"):
        assert policy.pop(name) == "'self'"
    assert policy.keys() == {
        *("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"),
    }
    assert set(policy.values()) == {"'none'"}


@pytest.mark.one_process
def test_its_files_are_answered_to_clients_only(servers: Servers) -> None:
    (server,) = servers({})
    etags = set()
    for path, kind in KINDS.items():
        url = f"{server.base_url}{PATH}{path}"
        answer = ask(url)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"] == kind
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
        assert "Set-Cookie" not in answer.headers
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
        etag = answer.headers["ETag"]
        assert etag == f'"{hashlib.sha256(answer.content).hexdigest()[:32]}"'
        etags.add(etag)
        head = ask(url, "HEAD")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["Content-Length"] == str(len(answer.content))
        again = ask(url, headers={"If-None-Match": etag})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
        for method in ("POST", "PUT", "DELETE"):
            assert unknown(ask(url, method), 405)
        assert unknown(ask(f"https://127.0.0.1:{server.federation_port}{PATH}{path}"))
    assert len(etags) == len(KINDS)
    for path in ("", "/page.js/", "/page.js/a", "//", "/page", "/../page.js", "/__init__.py"):
        assert unknown(ask(f"{server.base_url}{PATH}{path}")), path


@pytest.mark.requirement("H6")
@pytest.mark.one_process
def test_it_is_elsewhere_and_off_with_the_api(servers: Servers) -> None:
    elsewhere, off = servers(
        {"config": {"admin": {"path": "/elsewhere"}}}, {"config": {"admin": {"enabled": False}}}
    )
    assert ask(f"{elsewhere.base_url}/elsewhere/page.js").ok
    for server in (elsewhere, off):
        assert unknown(ask(f"{server.base_url}{PATH}/"))


def test_what_it_refers_to_is_there(servers: Servers) -> None:
    (server,) = servers({})
    text = ask(f"{server.base_url}{PATH}/").text
    assert {path[1:] for path in KINDS if path[1:] and f'"{path[1:]}"' in text} == {
        *("page.js", "page.css", "icon.svg"),
    }
    assert "<script>" not in text
    assert " style=" not in text


@pytest.mark.workers
def test_all_processes_for_clients_answer_and_no_others(lab: Lab) -> None:
    server = lab.make_workers()
    server.first_start()
    sockets = {name: server.socket_of(name) for name in server.processes}
    for name in (MAIN, *server.persisters):
        sockets[f"{name} (replication)"] = server.folder / f"{name}.replication.sock"
    status = {}
    for name, socket in sockets.items():
        connection = UnixConnection(socket)
        connection.request("GET", f"{PATH}/", headers={"X-Forwarded-For": "127.0.0.1"})
        status[name] = connection.getresponse().status
        connection.close()
    assert {name for name, code in status.items() if code == 200} == {MAIN, SYNC, SLIDING_SYNC}
    assert set(status.values()) == {200, 404}
