"""A federating server of the lab's own: it can send any PDU, and answer in any way."""

import itertools
import json
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, quote, unquote, urlsplit

import attr
from signedjson.key import encode_verify_key_base64, generate_signing_key, get_verify_key
from signedjson.sign import sign_json
from synapse.api.room_versions import KNOWN_ROOM_VERSIONS, RoomVersion
from synapse.crypto.event_signing import add_hashes_and_signatures
from synapse.events import make_event_from_dict

from tests.lab.client import STICKY_FIELD
from tests.lab.federation import FederationRequester


class Server(Protocol):
    """What a peer needs to know of a homeserver."""

    name: str
    federation_port: int


Answer = tuple[int, Any]
Pdu = dict[str, Any]

_MESSAGE = "org.example.call"
_DAY_MS = 24 * 3_600_000

_numbers = itertools.count()  # so that no two events are the same


def now_ms() -> int:
    return int(time.time() * 1000)


@attr.s(auto_attribs=True)
class PeerRoom:
    """A room as the peer knows it."""

    room_id: str
    version: RoomVersion
    state: dict[tuple[str, str], str]
    """Event IDs by type and state key: the state that it found when it joined, and its own."""
    extremities: list[str]
    depth: int


class Peer:
    """Answers ``/_matrix/federation`` and ``/_matrix/key`` over TLS, in threads.

    Args:
        certificate: the TLS certificate and its key, PEM files.

    What it sent and got is in ``events`` by ID. ``override`` may answer a request in place of the
    peer: it is called with the method and the path, and gives None to leave it to the peer.
    ``refuses`` says of which events of a transaction the peer answers with an error, ``ignores`` of
    which PDUs it says and keeps nothing, ``leaves_out`` which events it does not give as missing.
    ``joined`` answers who joins by the peer; it is called with the ID of the join.
    """

    def __init__(self, certificate: tuple[Path, Path]) -> None:
        # Another key ID for each: an earlier peer may have had the port, and its key be remembered.
        self.signing_key = generate_signing_key(f"peer_{secrets.token_hex(4)}")
        self.events: dict[str, Pdu] = {}
        self.received: list[Pdu] = []
        """The PDUs of all transactions, in order."""
        self.requests: list[str] = []
        self._versions: dict[str, RoomVersion] = {}
        self.override: Callable[[str, str], Answer | None] = lambda method, path: None
        self.refuses: Callable[[str], bool] = lambda event_id: False
        self.ignores: Callable[[Pdu], bool] = lambda pdu: False
        self.leaves_out: Callable[[str], bool] = lambda event_id: False
        self.joined: Callable[[str], Any] | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self.answer))
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.port: int = self._server.server_address[1]
        self.name = f"localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def user(self, name: str) -> str:
        return f"@{name}:{self.name}"

    def to(self, server: Server) -> FederationRequester:
        """The homeserver's federation API, asked by the peer."""
        return FederationRequester(self.name, self.signing_key, server.name, server.federation_port)

    # Events

    def know(self, room: PeerRoom) -> None:
        """Takes transactions with events of the room."""
        self._versions[room.room_id] = room.version

    def join(self, server: Server, room_id: str, user_id: str) -> PeerRoom:
        """Joins the user through the server, as any server would."""
        made = self.to(server).make_join(room_id, user_id)
        made.raise_for_status()
        version = KNOWN_ROOM_VERSIONS[made.json()["room_version"]]
        self._versions[room_id] = version
        template = made.json()["event"]
        template.update(origin=self.name, origin_server_ts=now_ms())
        join_id, join = self._signed(template, version)
        answer = self.to(server).request(
            "PUT", f"send_join/{quote(room_id, safe='')}/{quote(join_id, safe='')}", join, "v2"
        )
        answer.raise_for_status()
        body = answer.json()
        state = {}
        for pdu in [*body["auth_chain"], *body["state"], body.get("event", join)]:
            event_id = make_event_from_dict(pdu, version).event_id
            self.events[event_id] = pdu
            if pdu in body["state"]:
                state[pdu["type"], pdu["state_key"]] = event_id
        state["m.room.member", user_id] = join_id
        return PeerRoom(room_id, version, state, [join_id], join["depth"])

    def make(
        self,
        room: PeerRoom,
        sender: str,
        content: Any = None,
        *,
        kind: str = _MESSAGE,
        prev_events: Iterable[str] | None = None,
        **fields: Any,
    ) -> tuple[str, Pdu]:
        """A signed event on top of the room's latest; ``fields`` are set as they are, a value of
        None takes the field out. Nobody else knows of it yet."""
        event: Pdu = {
            "room_id": room.room_id,
            "type": kind,
            "sender": sender,
            "content": {"number": next(_numbers)} if content is None else content,
            "origin_server_ts": now_ms(),
            "prev_events": list(prev_events or room.extremities),
            "depth": room.depth + 1,
        }
        for field, value in fields.items():
            event[field] = value
        event["auth_events"] = self._auth_events(room, event)
        event_id, pdu = self._signed(
            {field: value for field, value in event.items() if value is not None}, room.version
        )
        return event_id, pdu

    def sticky(
        self, room: PeerRoom, sender: str, duration_ms: Any = 3_600_000, **fields: Any
    ) -> tuple[str, Pdu]:
        """A sticky event. ``duration_ms`` may be anything."""
        return self.make(room, sender, **{STICKY_FIELD: {"duration_ms": duration_ms}, **fields})

    def advance(self, room: PeerRoom, event_id: str) -> None:
        """The next event comes on top of this one."""
        room.extremities = [event_id]
        room.depth = self.events[event_id]["depth"]
        pdu = self.events[event_id]
        if "state_key" in pdu:
            room.state[pdu["type"], pdu["state_key"]] = event_id

    def _signed(self, event: Pdu, version: RoomVersion) -> tuple[str, Pdu]:
        event = {k: v for k, v in event.items() if k not in {"hashes", "signatures"}}
        add_hashes_and_signatures(version, event, self.name, self.signing_key)
        event_id = make_event_from_dict(event, version).event_id
        self.events[event_id] = event
        return event_id, event

    @staticmethod
    def _auth_events(room: PeerRoom, event: Pdu) -> list[str]:
        keys = [("m.room.power_levels", ""), ("m.room.member", event["sender"])]
        if not room.version.msc4291_room_ids_as_hashes:
            keys.append(("m.room.create", ""))
        if event["type"] == "m.room.member":
            keys.append(("m.room.join_rules", ""))
        return [room.state[key] for key in keys if key in room.state]

    # Answers

    def answer(  # noqa: PLR0911  # one for each request that it knows
        self, method: str, path: str, body: Any
    ) -> Answer:
        self.requests.append(f"{method} {path}")
        overridden = self.override(method, path)
        if overridden is not None:
            return overridden
        parts = [unquote(part) for part in urlsplit(path).path.split("/")[2:]]
        query = parse_qs(urlsplit(path).query)
        match method, parts:
            case "GET", ["key", "v2", "server", *_]:
                return 200, self._keys()
            case "PUT", ["federation", "v1", "send", _]:
                return 200, {"pdus": self._take(body["pdus"])}
            case "PUT", ["federation", "v2", "send_join", _, event_id] if self.joined is not None:
                self.events[event_id] = body
                return 200, self.joined(event_id)
            case "GET", ["federation", "v1", "event", event_id] if event_id in self.events:
                return 200, self._transaction([event_id])
            case "GET", ["federation", "v1", "backfill", _]:
                return 200, self._transaction(self._before(query["v"], int(query["limit"][0])))
            case "POST", ["federation", "v1", "get_missing_events", _]:
                found = self._before(
                    [p for e in body["latest_events"] for p in self._prev(e)],
                    int(body["limit"]),
                    set(body["earliest_events"]),
                )
                given = [e for e in reversed(found) if not self.leaves_out(e)]
                return 200, {"events": [self.events[e] for e in given]}
            case "GET", ["federation", "v1", "event_auth", _, event_id]:
                return 200, {"auth_chain": [self.events[e] for e in self._auth_chain(event_id)]}
            case "GET", ["federation", "v1", "state_ids", room_id]:
                state = [e for e in self.events if self._is_state(e, room_id)]
                return 200, {"pdu_ids": state, "auth_chain_ids": state}
        return 404, {"errcode": "M_NOT_FOUND", "error": "The peer has no such thing"}

    def _keys(self) -> Any:
        verify_key = get_verify_key(self.signing_key)
        key_id = f"{verify_key.alg}:{verify_key.version}"
        keys = {
            "server_name": self.name,
            "verify_keys": {key_id: {"key": encode_verify_key_base64(verify_key)}},
            "old_verify_keys": {},
            "valid_until_ts": now_ms() + _DAY_MS,
        }
        return sign_json(keys, self.name, self.signing_key)

    def _take(self, pdus: list[Pdu]) -> dict[str, Any]:
        self.received += pdus
        results: dict[str, Any] = {}
        for pdu in pdus:
            if self.ignores(pdu):
                continue
            event_id = make_event_from_dict(pdu, self._versions[pdu["room_id"]]).event_id
            if self.refuses(event_id):
                results[event_id] = {"error": "The peer refuses it"}
            else:
                self.events[event_id] = pdu
                results[event_id] = {}
        return results

    def _transaction(self, event_ids: Iterable[str]) -> Any:
        return {
            "origin": self.name,
            "origin_server_ts": now_ms(),
            "pdus": [self.events[e] for e in event_ids],
        }

    def _prev(self, event_id: str) -> list[str]:
        return list(self.events.get(event_id, {}).get("prev_events", []))

    def _auth_chain(self, event_id: str) -> Iterable[str]:
        """The auth_events of an event, and theirs."""
        found: dict[str, None] = {}
        left = list(self.events.get(event_id, {}).get("auth_events", []))
        while left:
            auth_event_id = left.pop()
            if auth_event_id in self.events and auth_event_id not in found:
                found[auth_event_id] = None
                left += self.events[auth_event_id]["auth_events"]
        return found

    def _before(
        self, event_ids: Iterable[str], limit: int, stop_at: set[str] | None = None
    ) -> list[str]:
        """The events and those before them, the latest first."""
        found: list[str] = []
        left = list(event_ids)
        while left and len(found) < limit:
            event_id = left.pop(0)
            if event_id in found or event_id not in self.events or event_id in (stop_at or ()):
                continue
            found.append(event_id)
            left += self._prev(event_id)
        return found

    def _is_state(self, event_id: str, room_id: str) -> bool:
        pdu = self.events[event_id]
        # The event that makes a room of version 12 names no room: its ID is the room's.
        in_room = pdu.get("room_id", f"!{event_id[1:]}") == room_id
        return in_room and "state_key" in pdu


class _Handler(BaseHTTPRequestHandler):
    """One connection: requests with JSON, answers with JSON, or with the bytes given."""

    protocol_version = "HTTP/1.1"
    timeout = 300

    def __init__(self, answer: Callable[[str, str, Any], Answer], *args: Any) -> None:
        self._answer = answer
        super().__init__(*args)

    def _respond(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        status, answer = self._answer(self.command, self.path, body)
        is_html = isinstance(answer, bytes) and answer.startswith(b"<")
        encoded = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if is_html else "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    do_GET = do_PUT = do_POST = _respond  # noqa: N815  # the standard library's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name there
        """Says nothing: what was asked is in ``Peer.requests``."""
