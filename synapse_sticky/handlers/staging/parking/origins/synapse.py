"""Which servers Synapse asks nothing for now, and how it learns that one is up again."""

from collections.abc import Callable, Collection
from typing import Any

from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.seams import HOMESERVER, STORE, attributes, method, table

_TIMINGS = "synapse.storage.databases.main.transactions.DestinationRetryTimings"

SEAMS = (
    method(
        STORE,
        "async get_destination_retry_timings(destination, /) -> DestinationRetryTimings | None",
    ),
    *attributes(_TIMINGS, "retry_last_ts", "retry_interval"),
    method(HOMESERVER, "get_notifier() -> Notifier"),
    method("synapse.notifier.Notifier", "notify_remote_server_up(server)", is_replaced=True),
    method(HOMESERVER, "get_federation_http_client() -> MatrixFederationHttpClient"),
    method(
        "synapse.http.matrixfederationclient.MatrixFederationHttpClient",
        "async get_json(destination, /, *, path, timeout, ignore_backoff)",
    ),
    table("federation_inbound_events_staging", "origin text, event_id text"),
)

_SMALL = "/_matrix/key/v2/server"
"""Each server answers this, to anybody, and it is not limited."""

_TIMEOUT_MS = 10_000


class SynapseOrigins:
    """Implements ``trying.Origins``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._client: Any = homeserver.hs.get_federation_http_client()

    def on_up(self, listener: Callable[[str], None]) -> None:
        def make(original: Callable[..., None]) -> Callable[..., None]:
            # It is called in each process, once the server is not backed off any more.
            def notify_remote_server_up(server: str, *args: Any, **options: Any) -> None:
                original(server, *args, **options)
                listener(server)

            return notify_remote_server_up

        notifier = self._homeserver.hs.get_notifier()
        self._homeserver.replace(notifier, "notify_remote_server_up", make)

    async def is_backed_off(self, origin: str) -> bool:
        timings = await self._store.get_destination_retry_timings(origin)
        if timings is None:
            return False
        ends_ms: int = timings.retry_last_ts + timings.retry_interval
        return ends_ms > self._homeserver.now_ms()

    async def ask(self, origin: str) -> None:
        # With a timeout of its own, Synapse's client does not ask again. An answer ends the
        # back-off; without one it stays as it is.
        await self._client.get_json(origin, path=_SMALL, timeout=_TIMEOUT_MS, ignore_backoff=True)

    async def still_staged(self, origin: str, event_ids: Collection[str]) -> set[str]:
        # There is an index by both.
        select = "SELECT event_id FROM federation_inbound_events_staging WHERE origin = ? AND"

        def read_txn(txn: Cursor) -> set[str]:
            found = set()
            for portion in portions(event_ids):
                clause, args = self._homeserver.in_list("event_id", portion)
                txn.execute(f"{select} {clause}", (origin, *args))
                found |= {event_id for (event_id,) in txn.fetchall()}
            return found

        return await self._homeserver.transact("staged", read_txn)
