"""Whether a transaction of another server is taken in at all (L1, L2, L6).

In mode ``reject`` one that is past a limit is refused whole, before Synapse touches it; in both
modes one of a server that has too much waiting already. Only the origin is proven here: an event
is charged to it and, if that is a user of the origin, to its sender. The room-wide limit is not
for here, as refusing cannot share it fairly; it is kept when events are released.

Fails open: a transaction that cannot be checked is taken.
"""

from collections import OrderedDict

from synapse_sticky._core import sticky_duration_ms, sticky_until_ms
from synapse_sticky.config import FederationConfig, Mode
from synapse_sticky.homeserver import Homeserver, ReceivedPdu, Refusal, Transaction
from synapse_sticky.limits import LimitReport, federation_limiter
from synapse_sticky.storage import Storage

_LONGEST_ID = 255
_ORIGINS = 10_000
_RETRY_MIN_MS = 1_000
_RETRY_MAX_MS = 60_000


class ReceiptHandler:
    """Checks transactions of other servers."""

    def __init__(
        self,
        homeserver: Homeserver,
        storage: Storage,
        config: FederationConfig,
        report: LimitReport,
    ) -> None:
        self._hs = homeserver
        self._storage = storage
        self._config = config
        self._report = report
        self._is_exempt = config.exempts()
        self._limiter = federation_limiter(config)
        # What was charged last for each origin: a transaction may fail and come again.
        self._charged: OrderedDict[str, tuple[str, bytes]] = OrderedDict()

    async def start(self) -> None:
        """Takes effect from the next transaction on."""
        self._hs.inbound.check_transactions(self.check)

    async def check(self, transaction: Transaction) -> Refusal | None:
        """Is the transaction refused? Sticky PDUs that are invalid or have expired are free."""
        origin = transaction.origin
        if self._is_exempt(origin):
            return None
        claims = [self._claim(pdu, origin) for pdu in transaction.pdus if self._is_unexpired(pdu)]
        if not claims:
            return None
        # Synapse gives the answer that it gave before.
        if await self._hs.inbound.answered(origin, transaction.transaction_id):
            return None
        where = _rooms_of(claims)
        refusal = await self._too_many_wait(origin) or self._past_a_limit(transaction, claims)
        if refusal is not None:
            self._report.refused(refusal.limit, origin, where, refusal.retry_after_ms, len(claims))
        return refusal

    async def _too_many_wait(self, origin: str) -> Refusal | None:
        most = self._config.max_deferred_per_server
        # One short of the most, so that at the most it is exact.
        waiting = await self._storage.waiting(origin, most - 1)
        if waiting < most:
            return None
        limits = (self._config.per_server, self._config.per_server_in_room)
        per_second = min((limit.per_second for limit in limits if limit), default=1.0)
        retry_after_ms = round((waiting - most + 1) * 1000 / per_second)
        return Refusal(
            "max_deferred_per_server", min(max(retry_after_ms, _RETRY_MIN_MS), _RETRY_MAX_MS)
        )

    def _past_a_limit(
        self, transaction: Transaction, claims: list[tuple[str | None, str | None]]
    ) -> Refusal | None:
        if self._config.mode is not Mode.REJECT:
            return None
        origin = transaction.origin
        # The ID alone would not do: the origin may put other PDUs under it.
        receipt = (transaction.transaction_id, transaction.fingerprint())
        if self._charged.get(origin) == receipt:
            return None
        refused = self._limiter.admit_transaction(origin, claims, self._hs.now_ms())
        if refused is not None:
            return Refusal(*refused)
        self._charged[origin] = receipt
        self._charged.move_to_end(origin)
        if len(self._charged) > _ORIGINS:
            self._charged.popitem(last=False)
        return None

    def _is_unexpired(self, pdu: ReceivedPdu) -> bool:
        duration_ms = sticky_duration_ms(pdu.sticky_field)
        sent_ms = pdu.origin_server_ts
        if duration_ms is None or isinstance(sent_ms, bool) or not isinstance(sent_ms, int):
            return False
        now_ms = self._hs.now_ms()
        return sticky_until_ms(duration_ms, sent_ms, now_ms) > now_ms

    def _claim(self, pdu: ReceivedPdu, origin: str) -> tuple[str | None, str | None]:
        """The room and sender to charge, as far as the claims can be believed."""
        room_id, sender = pdu.room_id, pdu.sender
        if not isinstance(room_id, str) or not _is_id(room_id):
            return None, None
        if not isinstance(sender, str) or not _is_id(sender):
            return room_id, None
        return room_id, sender if sender.partition(":")[2] == origin else None


def _is_id(name: str) -> bool:
    # No ID is longer, and none has half a character in it; what is made up costs no memory.
    return len(name) <= _LONGEST_ID and name.isprintable()


def _rooms_of(claims: list[tuple[str | None, str | None]]) -> str:
    rooms = sorted({room_id for room_id, _ in claims if room_id is not None})
    more = f" and {len(rooms) - 1} more rooms" if len(rooms) > 1 else ""
    return f"in {rooms[0]}{more}" if rooms else ""
