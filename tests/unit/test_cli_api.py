"""The commands that ask the API for administrators: what they send, print and refuse (E3)."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import attr
import pytest

from synapse_sticky.cli import main
from synapse_sticky.cli.api.client import AskingError, Client

pytestmark = pytest.mark.requirement("E3")

NOW_MS = 1_700_000_000_000
OVERVIEW: dict[str, Any] = {
    "now_ms": NOW_MS,
    "server_name": "here.example",
    "counted_up_to": 100_000,
    "limits": {"mode": "defer"},
    "active": {"events": 12, "rooms": 3},
    "staged": {"pdus": 100_000, "rooms": 1, "oldest_ms": NOW_MS - 5_000},
    "backlog": {"rooms_of_servers": 4, "servers": 2},
    "deferred": {"events": 7, "by_limit": {"per_sender": 7}, "servers": 1},
    "parked": None,
    "newcomers": {"all": 2, "open": 1, "oldest_open_ms": NOW_MS - 60_000},
}
STEPS = [
    "received",
    "staged",
    "parked",
    "persisted",
    "checked",
    "limited",
    "delivered",
    "pushed",
    "expired",
]
EVENT: dict[str, Any] = {
    "event_id": "$a/b",
    "room_id": "!room:here.example",
    "sender": "@mallory:there.example",
    "type": "m.rtc.member",
    "now_ms": NOW_MS,
    "verdict": {"code": "deferred", "text": "It is past per_sender.", "to_do": "Wait."},
    "reasons": [],
    "steps": [
        {"name": name, "state": "done", "text": "", "at_ms": NOW_MS, "details": {}}
        for name in STEPS
    ],
    "receivers": [
        {
            "server": "there.example",
            "state": "unreachable",
            "newcomer_since_ms": None,
            "failing_since_ms": NOW_MS,
            "next_try_ms": None,
        }
    ],
    "receivers_total": 700,
    "next": "there.example",
}


@attr.s(auto_attribs=True)
class Api:
    """A server of HTTP that answers everything alike.

    asked: path and headers of each request.
    """

    url: str
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = attr.Factory(dict)
    asked: list[tuple[str, dict[str, str]]] = attr.Factory(list)

    def answers(self, status: int, body: object, **headers: str) -> None:
        self.status, self.headers = status, headers
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    made = Api("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append((self.path, dict(self.headers)))
            self.send_response(made.status)
            for name, value in made.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(made.body)))
            self.end_headers()
            self.wfile.write(made.body)

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002  its name

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setenv("SYNAPSE_STICKY_TOKEN", "secret")
    monkeypatch.setenv("SYNAPSE_STICKY_URL", made.url)
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def test_status(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.answers(200, OVERVIEW)
    assert main(["status"]) == 0
    said = capsys.readouterr().out
    for expected in (
        *("here.example", "12 in 3 rooms", "100000 or more in 1 rooms", "5 s", "60 s"),
        *("deferred events", "per_sender", "not known, as the duty has no table"),
    ):
        assert expected in said
    ((path, headers),) = api.asked
    assert path == "/_synapse/sticky/admin/v1/overview"
    assert headers["Authorization"] == "Bearer secret"
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == OVERVIEW


def test_why(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.answers(200, EVENT)
    room, sender = "!r oom:x&y", "@ü:there.example"
    assert main(["why", "$a/b", "--room", room, "--sender", sender]) == 0
    said = capsys.readouterr().out
    expected = ("deferred: It is past per_sender.", "Wait.", "unreachable", "--from there.example")
    for text in (*expected, *STEPS):
        assert text in said
    parts = urlsplit(api.asked[0][0])
    assert unquote(parts.path.rpartition("/")[2]) == "$a/b"
    assert parse_qs(parts.query) == {"room_id": [room], "sender": [sender]}


def test_event_id_that_the_shell_has_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", ""]) == 2
    assert "Put it in single quotes" in capsys.readouterr().err


def test_hostile_names_do_not_reach_the_terminal(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07[red]"
    steps = [{**step, "text": evil} for step in EVENT["steps"]]
    receivers = [{**EVENT["receivers"][0], "server": evil}]
    names = {"room_id": evil, "sender": evil, "type": evil}
    api.answers(200, {**EVENT, **names, "steps": steps, "receivers": receivers, "next": evil})
    assert main(["why", "$a"]) == 0
    api_said = capsys.readouterr().out
    by_limit = {"events": 1, "by_limit": {evil: 1}, "servers": 1}
    api.answers(200, {**OVERVIEW, "server_name": evil, "deferred": by_limit})
    assert main(["status"]) == 0
    for said in (api_said, capsys.readouterr().out):
        assert "\x1b" not in said
        assert "\x07" not in said
        assert "?]0;owned?[red]" in said


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, {"errcode": "M_UNKNOWN_TOKEN", "error": "Gone"}, "Log in anew"),
        (403, {"errcode": "M_FORBIDDEN", "error": "You are not"}, "is no server admin"),
        (404, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized"}, "the option `admin`"),
        (404, b"<html>", "the option `admin`"),
        (404, {"errcode": "M_NOT_FOUND", "error": "No such event"}, "No such event."),
        (429, {"errcode": "M_LIMIT_EXCEEDED", "error": "Too many"}, "Ask less often"),
        (502, b"<html>", "answered 502: Bad Gateway"),
        (500, [], "answered 500"),
        (200, b"<html>", "did not answer with JSON"),
    ],
)
def test_an_answer_that_is_none(
    api: Api, capsys: pytest.CaptureFixture[str], status: int, body: object, said: str
) -> None:
    api.answers(status, body)
    assert main(["status"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert (printed.out, "Traceback" in printed.err, "secret" in printed.err) == ("", False, False)


def test_a_redirect_is_not_given_the_token(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.answers(302, b"", Location=f"{api.url}/elsewhere")
    assert main(["status"]) == 2
    assert "answered 302" in capsys.readouterr().err
    assert len(api.asked) == 1


def test_a_proxy_is_not_given_the_token(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", api.url)
    assert main(["status", "--url", "http://127.0.0.1:1"]) == 2
    assert api.asked == []


def test_a_server_that_is_down(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", "http://127.0.0.1:1"]) == 2
    assert "Is Synapse running" in capsys.readouterr().err


def test_token_in_a_file(
    api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.answers(200, OVERVIEW)
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    assert main(["status", "--token-file", str(file)]) == 0
    assert api.asked[0][1]["Authorization"] == "Bearer from-a-file"
    assert main(["status", "--token-file", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    for wrong in ("two\nlines", "with a blank", "ü"):
        file.write_text(wrong)
        assert main(["status", "--token-file", str(file)]) == 2
        assert "characters that no token has" in capsys.readouterr().err
    monkeypatch.delenv("SYNAPSE_STICKY_TOKEN")
    assert main(["status"]) == 2
    assert "There is no token" in capsys.readouterr().err


def test_watch_goes_on_until_somebody_ends_it(
    api: Api, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the server does not answer meanwhile."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        deferred = {"events": len(pauses), "by_limit": {}, "servers": 1}
        match len(pauses) % 4:
            case 1:
                api.answers(502, b"")
            case 2 | 3:
                api.answers(200, {**OVERVIEW, "deferred": deferred})
            case _:
                raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", pause)
    api.answers(200, OVERVIEW)
    assert main(["watch", "--every", "7", "--json"]) == 0
    printed = capsys.readouterr()
    found = [json.loads(line)["deferred"]["events"] for line in printed.out.splitlines()]
    assert found == [7, 2, 3]
    assert "answered 502" in printed.err
    assert pauses == [7] * 4
    api.answers(200, OVERVIEW)
    assert main(["watch"]) == 0
    assert "sticky events" in capsys.readouterr().out
    assert pauses[4:] == [5] * 4
    # What is wrong from the beginning is said, and ends it.
    api.answers(403, {"errcode": "M_FORBIDDEN", "error": "You are not"})
    assert main(["watch"]) == 2
    assert len(pauses) == 8


def test_address() -> None:
    for wrong in ("localhost:8008", "ftp://localhost", "http://", "file:///etc/passwd", ""):
        with pytest.raises(AskingError, match="is no address"):
            Client(wrong, "token")


def test_another_path(api: Api) -> None:
    api.answers(200, OVERVIEW)
    assert main(["status", "--url", f"{api.url}/_synapse/other/"]) == 0
    assert api.asked[0][0] == "/_synapse/other/admin/v1/overview"
