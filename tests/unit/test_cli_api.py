"""The commands that ask the API for administrators: what they send, print and refuse (E3)."""

import io
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
from synapse_sticky.cli.texts import printable

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
    ordered: method, path and body of those that are no GET.
    """

    url: str
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = attr.Factory(dict)
    asked: list[tuple[str, dict[str, str]]] = attr.Factory(list)
    ordered: list[tuple[str, str, Any]] = attr.Factory(list)

    def answers(self, status: int, body: object, **headers: str) -> None:
        self.status, self.headers = status, headers
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    made = Api("")

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length", "0"))
            body = json.loads(self.rfile.read(length)) if length else None
            if self.command != "GET":
                made.ordered.append((self.command, self.path, body))
            made.asked.append((self.path, dict(self.headers)))
            self.send_response(made.status)
            for name, value in made.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(made.body)))
            self.end_headers()
            self.wfile.write(made.body)

        do_GET = do_POST = do_DELETE = _answer  # noqa: N815  the standard library's names

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


ACTION: dict[str, Any] = {
    "action_id": "an ID",
    "kind": "hold",
    "server": "flood.example",
    "room_id": None,
    "sender": None,
    "reason": "a flood",
    "made_by": "@admin:here.example",
    "made_ms": NOW_MS,
    "until_ms": NOW_MS + 600_000,
    "ended_by": None,
    "ended_ms": None,
    "in_force": True,
}


def test_an_id_can_be_copied_from_a_narrow_terminal(
    api: Api, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    api.answers(200, {"now_ms": NOW_MS, "actions": [{**ACTION, "action_id": "abcdefgh12345678"}]})
    assert main(["actions"]) == 0
    said = capsys.readouterr().out
    assert "abcdefgh12345678" in said
    assert "…" not in said


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (
            ["hold", "--server", "flood.example", "--for", "10m", "--reason", "a flood"],
            {"kind": "hold", "server": "flood.example", "for_ms": 600_000, "reason": "a flood"},
        ),
        (
            ["exempt", "--sender", "@a:there", "--for", "1h"],
            {"kind": "exempt", "sender": "@a:there", "for_ms": 3_600_000},
        ),
        (
            ["release", "--server", "there", "--room", "!r"],
            {"kind": "release", "server": "there", "room_id": "!r"},
        ),
        (
            ["discard", "--sender", "@a:there", "--yes"],
            {"kind": "discard", "sender": "@a:there"},
        ),
        (
            ["push", "!r", "there", "--reason", "it was restored"],
            {"kind": "push", "room_id": "!r", "server": "there", "reason": "it was restored"},
        ),
    ],
)
def test_what_is_ordered(
    api: Api, capsys: pytest.CaptureFixture[str], arguments: list[str], body: object
) -> None:
    api.answers(200, ACTION)
    assert main(arguments) == 0
    assert "hold of flood.example is in force" in capsys.readouterr().out
    assert api.ordered == [("POST", "/_synapse/sticky/admin/v1/actions", body)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["release"], "--server or --room or --sender"),
        (["exempt", "--for", "1h"], "--server or --sender"),
        (["hold"], "Missing option '--server'"),
        (["discard", "--yes"], "--server or --room or --sender"),
        (["push", "!r"], "Missing argument 'SERVER'"),
        (["hold", "--server", "a", "--for", "60"], "with a unit"),
        (["hold", "--server", "a", "--for", "8d"], "a duration from"),
    ],
)
def test_what_is_not_ordered(
    api: Api, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert api.asked == []


def test_end_and_actions(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    ended = {**ACTION, "in_force": False, "ended_by": "@admin:here.example"}
    api.answers(200, ended)
    assert main(["end", "an ID/"]) == 0
    assert "is over" in capsys.readouterr().out
    assert api.ordered == [("DELETE", "/_synapse/sticky/admin/v1/actions/an%20ID%2F", None)]
    api.answers(200, {"now_ms": NOW_MS, "actions": [ended], "next": "5; $(x)"})
    assert main(["actions"]) == 0
    said = capsys.readouterr().out
    assert "flood" in said
    assert "--from '5; $(x)'" in said


def test_lists(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"active": 3, "deferred": 2, "parked": 1}
    room = {"room_id": "!r", "name": "A name", "alias": None, **counts}
    api.answers(200, {"now_ms": NOW_MS, "rooms": [room]})
    assert main(["rooms", "--order-by", "deferred", "--limit", "5"]) == 0
    assert "A name" in capsys.readouterr().out
    event = {"event_id": "$e", "sender": "@a:b", "type": None, "state": "deferred"}
    times = {"why": "per_sender", "since_ms": None, "ends_ms": NOW_MS}
    api.answers(200, {"now_ms": NOW_MS, "room_id": "!r", "events": [{**event, **times}]})
    assert main(["rooms", "!r/x", "--from", "d 1"]) == 0
    assert "per_se" in capsys.readouterr().out
    server = {"server": "there", **counts, "lacking": 4, "newcomer": 5, "is_refused": True}
    states = {"failing_since_ms": NOW_MS, "next_try_ms": None}
    of_late = {"refused_lately": {"per_server": 8}, "deferred_lately": "not recorded"}
    lately = {"process": "worker1", "since_ms": NOW_MS}
    most = [{"server": "else\u200bwhere", "events": 7}]
    answer = {"now_ms": NOW_MS, "servers": [{**server, **states, **of_late}]}
    api.answers(200, {**answer, "lately": {**lately, "most_refused": most}})
    assert main(["servers", "--order-by", "name"]) == 0
    said = capsys.readouterr().out
    for expected in (
        *("429", "as far as the process worker1 knows", "Refused most: else\\u200bwhere (7)"),
        "there: refused 8 (per_server)\n",
    ):
        assert expected in said
    api.answers(200, {**answer, "lately": {**lately, "most_refused": "not recorded"}})
    assert main(["servers", "--reverse"]) == 0
    assert "Refused: not recorded" in capsys.readouterr().out
    base = "/_synapse/sticky/admin/v1"
    assert [path for path, _ in api.asked] == [
        f"{base}/rooms?order_by=deferred&dir=b&limit=5",
        f"{base}/rooms/%21r%2Fx/events?limit=100&from=d+1",
        f"{base}/servers?order_by=name&dir=f&limit=100",
        f"{base}/servers?dir=f&limit=100",
    ]


@pytest.mark.parametrize(("typed", "code"), [("y\n", 0), ("n\n", 1), ("", 1)])
def test_what_cannot_be_undone_is_asked_first(
    api: Api,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    code: int,
) -> None:
    """Nothing is taken for yes where nobody can answer."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    api.answers(200, {**ACTION, "kind": "discard"})
    assert main(["discard", "--server", "fl\u200bood", "--room", "!r", "--json"]) == code
    printed = capsys.readouterr()
    assert "Discard what waits of fl\\u200bood, !r?" in printed.err
    assert len(api.ordered) == (code == 0)
    assert bool(printed.out) is (code == 0), "with --json nothing else is on stdout"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 日本 🎈", "plain ü 日本 🎈"),
        ("a\u200bb\u2060\ufeff", r"a\u200bb\u2060\ufeff"),
        ("\u202egro.elpmaxe\u2066", r"\u202egro.elpmaxe\u2066"),
        ("\x1b[2J\x07\n\x7f", r"\u001b[2J\u0007\u000a\u007f"),
        ("a\u00a0b\u3000c\u2028", r"a\u00a0b\u3000c\u2028"),
        ("\u3164\u115f\u2800\ufe0f\u034f", r"\u3164\u115f\u2800\ufe0f\u034f"),
        ("\U000e0041\U000e0100", r"\U000e0041\U000e0100"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_nobody_sees_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


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
        assert "\\u001b]0;owned\\u0007[red]" in said


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
