"""Which servers are asked nothing for now, and what ends that (H2, H4, L3)."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from synapse.app.homeserver import SynapseHomeServer

from synapse_sticky.handlers.staging.parking.origins.synapse import SynapseOrigins
from synapse_sticky.homeserver import Homeserver
from tests.unit.test_limits_in_synapse import ROOM, done, make_homeserver, run_sql

ORIGIN = "there"
MINUTE_MS = 60_000


@pytest.fixture(scope="module")
def hs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SynapseHomeServer]:
    hs = make_homeserver(tmp_path_factory.mktemp("homeserver"))
    reactor: Any = hs.get_reactor()
    reactor.rightNow = 1_000_000.0
    yield hs
    for connection in hs.get_datastores().main.db_pool._db_pool.connections.values():
        connection.close()


@pytest.fixture
def homeserver(hs: SynapseHomeServer) -> Iterator[Homeserver]:
    with closing(Homeserver(hs.get_module_api())) as homeserver:
        yield homeserver


@pytest.mark.requirement("H2")
def test_a_server_is_backed_off_for_as_long_as_synapse_says(homeserver: Homeserver) -> None:
    origins, store = SynapseOrigins(homeserver), homeserver.store
    assert not done(origins.is_backed_off(ORIGIN))
    now_ms = homeserver.now_ms()
    for last_ms, is_off in ((now_ms, True), (now_ms - 2 * MINUTE_MS, False), (0, False)):
        interval_ms = MINUTE_MS if last_ms else 0
        # Else Synapse keeps the longest.
        done(store.set_destination_retry_timings(ORIGIN, None, 0, 0))
        done(store.set_destination_retry_timings(ORIGIN, last_ms or None, last_ms, interval_ms))
        assert done(origins.is_backed_off(ORIGIN)) is is_off


@pytest.mark.requirement("L3", "H7")
def test_it_is_said_that_a_server_is_up(homeserver: Homeserver) -> None:
    """After Synapse has done what it does then, whoever calls it, and in whatever way."""
    told: list[str] = []
    notifier = homeserver.hs.get_notifier()

    def notify_remote_server_up(server: str) -> None:
        told.append(server)

    homeserver.replace(notifier, "notify_remote_server_up", lambda _: notify_remote_server_up)
    SynapseOrigins(homeserver).on_up(lambda server: told.append(f"{server} is up"))
    notifier.notify_remote_server_up(ORIGIN)
    assert told == [ORIGIN, f"{ORIGIN} is up"]


@pytest.mark.requirement("H2", "H4")
def test_a_server_is_asked_once_and_that_changes_nothing(homeserver: Homeserver) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    async def get_json(destination: str, **options: Any) -> Any:
        asked.append((destination, options))
        raise ConnectionError(destination)

    client = homeserver.hs.get_federation_http_client()
    homeserver.replace(client, "get_json", lambda _: get_json)
    with pytest.raises(ConnectionError):
        done(SynapseOrigins(homeserver).ask(ORIGIN))
    ((destination, options),) = asked
    assert destination == ORIGIN
    # Whoever gives a timeout is not answered by a second try, and who ignores the back-off does not
    # prolong it.
    assert options["ignore_backoff"] is True
    assert options["timeout"] > 0


@pytest.mark.requirement("L3")
def test_what_is_still_staged(homeserver: Homeserver) -> None:
    for origin, event_id in ((ORIGIN, "$1"), ("elsewhere", "$2")):
        run_sql(
            homeserver,
            "INSERT INTO federation_inbound_events_staging"
            " (origin, event_id, room_id, received_ts, event_json, internal_metadata)"
            " VALUES (?, ?, ?, 0, '{}', '{}')",
            *(origin, event_id, ROOM),
        )
    assert done(SynapseOrigins(homeserver).still_staged(ORIGIN, {"$1", "$2", "$3"})) == {"$1"}
