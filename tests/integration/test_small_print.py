"""What the small print of docs/guarantees.md says of other parts of Synapse is so."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Servers
from tests.integration.rooms import deferred, limits, wait_until_taken_in
from tests.lab import Client, Peer, wait_until
from tests.lab.client import WITHOUT_TIMELINE, ApiError, sticky_events
from tests.lab.scene import enter

pytestmark = [pytest.mark.one_process, pytest.mark.slow]

BURST = 5
DEFERRING = limits(per_server={"per_second": 0.001, "burst_count": BURST})


class Notified:
    """An application service and a push gateway. ``events`` and ``pushes`` have event IDs, once for
    each time that one came."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.pushes: list[str] = []
        take = self._take

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                take(json.loads(self.rfile.read(length) or "{}"))
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_GET = do_PUT = do_POST = answer  # noqa: N815  # the standard library's names

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def _take(self, body: Any) -> None:
        self.events += [event["event_id"] for event in body.get("events", ())]
        # Without an event ID it is the number of unread messages.
        if event_id := body.get("notification", {}).get("event_id"):
            self.pushes.append(event_id)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def registration(self, path: Path) -> Path:
        """Of the application service, which is interested in all rooms."""
        said = {
            "id": "interested",
            "as_token": "as",
            "hs_token": "hs",
            "url": self.url,
            "sender_localpart": "bot",
            "rate_limited": False,
            "namespaces": {"rooms": [{"regex": ".*", "exclusive": False}]},
        }
        path.write_text(json.dumps(said))
        return path

    def push_all(self, client: Client, room_id: str) -> None:
        """Every event of the room is pushed to the gateway."""
        rule = {"actions": ["notify"]}
        client.request("PUT", f"pushrules/global/room/{room_id}", rule)
        data = {"url": f"{self.url}/_matrix/push/v1/notify", "format": "event_id_only"}
        names = ("app_display_name", "device_display_name", "lang", "profile_tag")
        pusher = {**dict.fromkeys(names, "x"), "kind": "http", "app_id": "x", "pushkey": "x"}
        client.request("POST", "pushers/set", {**pusher, "data": data})


@pytest.fixture
def notified() -> Iterator[Notified]:
    with closing(Notified()) as started:
        yield started


@pytest.mark.requirement("L4")
def test_application_services_and_pushes_do_not_wait(
    servers: Servers, peer: Peer, tmp_path: Path, notified: Notified
) -> None:
    """They have a deferred event at once, and not again when it is released."""
    files = {"app_service_config_files": [str(notified.registration(tmp_path / "as.yaml"))]}
    (server,) = servers({"config": DEFERRING, "extra": files})
    scene = enter(server, peer)
    notified.push_all(scene.alice, scene.room_id)
    flood = scene.flood(2 * BURST)
    wait_until_taken_in(server, scene.room_id, {*flood})
    for said in (notified.events, notified.pushes):
        wait_until(lambda said=said: {*said} >= {*flood}, "all to be told")  # type: ignore[misc]
    assert deferred(server) == {*flood[BURST:]}

    server.configure_module({"federation": {"mode": "off"}})
    server.restart()
    scene.wait_for_sections(*flood)
    last = scene.sticky()
    for said in (notified.events, notified.pushes):
        wait_until(lambda said=said: last in said, "the last one to be told")  # type: ignore[misc]
        count = Counter(said)
        assert {event_id: count[event_id] for event_id in flood} == dict.fromkeys(flood, 1)


@pytest.mark.requirement("D4", "D5")
def test_a_hundred_a_response_but_all_after_a_join(servers: Servers) -> None:
    (server,) = servers({"config": {"local": {"per_user": None}}})
    alice, bob, carol = server.user("alice"), server.user("bob"), server.user("carol")
    room_id = alice.create_room()
    bob.join(room_id)
    before = bob.sync()["next_batch"]
    sent = [alice.send_sticky(room_id) for _ in range(130)]
    carols = carol.sync()["next_batch"]
    carol.join(room_id)

    def section(client: Client, since: str) -> list[str]:
        return sticky_events(client.sync(since, filter_=WITHOUT_TIMELINE), room_id)

    wait_until(lambda: {*section(carol, carols)} == {*sent}, "all after the join")
    assert section(bob, before) == sent[:100]


@pytest.mark.requirement("S2", "D3")
def test_a_room_upgrade(servers: Servers) -> None:
    """The old room's events stay sticky, for who is in it; the new room begins without."""
    (server,) = servers({})
    alice, bob = server.user("alice"), server.user("bob")
    old = alice.create_room(room_version="10")
    bob.join(old)
    event_id = bob.send_sticky(old)
    answer = alice.request("POST", f"rooms/{old}/upgrade", {"new_version": "11"})
    new = answer["replacement_room"]
    bob.join(new)
    sync = bob.sync(filter_=WITHOUT_TIMELINE)
    assert sticky_events(sync, old) == [event_id]
    assert sticky_events(sync, new) == []
    with pytest.raises(ApiError) as error:
        bob.send_sticky(old)
    assert (error.value.status, error.value.errcode) == (403, "M_FORBIDDEN")
    again = bob.send_sticky(new)
    assert sticky_events(bob.sync(filter_=WITHOUT_TIMELINE), new) == [again]
