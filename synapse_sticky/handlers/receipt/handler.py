"""Whether a transaction of another server is accepted at all (L1, L2, L6).

In mode ``reject`` a transaction past a limit is refused whole, before Synapse touches it. In both
modes a transaction is refused while its server has too many events deferred or staged, or too many
staged in one of the transaction's rooms. Only the
origin is proven here. So an event is charged to the origin, and to its sender if that is a user of
the origin. The limit of a room (``per_room``) does not apply here, because refusals cannot share it
fairly; it applies when events are persisted and released.

Fails open: a transaction that cannot be checked is accepted.
"""

import hashlib
import json
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import attr

from synapse_sticky._core import sticky_until_ms
from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.config import FederationConfig, Mode
from synapse_sticky.handlers.receipt.slack import Slack
from synapse_sticky.handlers.receipt.staged import (
    Excess,
    StagedCounts,
    StagingArea,
    StickyPdu,
)
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import HasLayout, NewerLayoutError, migrate
from synapse_sticky.limits import LimitReport, Refusal, federation_limiter, most_deferred
from synapse_sticky.logs import bounded
from synapse_sticky.orders import Orders
from synapse_sticky.renewal import Renewed

logger = bounded(__name__)

_MAX_ID_LENGTH = 255
_MAX_ORIGINS = 10_000
_RETRY_MIN_MS = 1_000
_RETRY_MAX_MS = 60_000
_PROCESSING_MS = 50
"""About how long it takes to process a staged PDU in a busy room."""

_LOOK_BACKOFF = Backoff(5_000, 30_000, spread=0)

_Claim = tuple[str | None, str | None]
"""The room ID and the sender of a PDU, as far as they can be believed."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ReceivedPdu:
    """A PDU with the sticky field. All values are claims of the origin, and of any type."""

    room_id: object
    sender: object
    sticky_field: object
    origin_server_ts: object


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Transaction:
    """A ``/send`` transaction with at least one PDU that has the sticky field.

    origin: the server that sent it; proven, by the request's signature.
    pdus: those of its PDUs that have the sticky field.
    received: the same PDUs as they were received.
    """

    origin: str
    transaction_id: str
    pdus: Sequence[ReceivedPdu]
    received: Sequence[Mapping[str, object]]

    def fingerprint(self) -> bytes:
        """A digest of the PDUs."""
        try:
            dumped = json.dumps(self.received, sort_keys=True).encode()
        except RecursionError:
            # They are nested almost too deeply to be parsed. They are charged each time.
            dumped = secrets.token_bytes(32)
        return hashlib.sha256(dumped).digest()


Check = Callable[[Transaction], Awaitable[Refusal | None]]


class Receipt(StagingArea, Protocol):
    """Transactions of other servers, in a process that receives them."""

    def check_transactions(self, check: Check) -> None:
        """From now on asks ``check`` before Synapse touches a transaction that has sticky PDUs.

        A refused transaction leaves no trace. If ``check`` fails, Synapse gets the transaction.
        """

    async def is_answered(self, origin: str, transaction_id: str) -> bool:
        """Has Synapse answered this transaction before? Then it repeats its answer."""

    def tell_staged(self, staged: Callable[[str, StickyPdu], None]) -> None:
        """From now on tells of each PDU that this process stages, with its origin."""


class DeferredEvents(HasLayout, Protocol):
    """The table of deferred events."""

    def count_txn(self, txn: Cursor, server: str, at_most: int) -> int:
        """How many unexpired events of this server's users are deferred, counted up to
        ``at_most``."""


class ReceiptHandler:
    """Decides which transactions are refused."""

    def __init__(
        self,
        homeserver: Homeserver,
        receipt: Receipt,
        deferred: DeferredEvents,
        config: FederationConfig,
        report: LimitReport,
        orders: Orders | None = None,
    ) -> None:
        self._homeserver = homeserver
        self._orders = orders or Orders()
        self._receipt = receipt
        self._staged = StagedCounts(receipt, homeserver.now_ms)
        self._slack = Slack(homeserver.steady_ms)
        self._deferred = deferred
        self._config = config
        self._report = report
        self._is_exempt = config.exempts()
        self._is_exempt_user = config.exempts_user()
        self._limiter = Renewed(homeserver, "receipt", partial(federation_limiter, config))
        self._has_table: bool | None = None
        self._looking = Retrying(
            homeserver,
            "look_for_deferred",
            "receipt counts staged events only, not deferred ones",
            self._look_for_table,
            _LOOK_BACKOFF,
            is_said_once=True,
        )
        # What each origin was charged for last: its transaction may fail and come again.
        self._charged: OrderedDict[str, tuple[str, bytes]] = OrderedDict()

    def install(self) -> None:
        """Takes effect from the next transaction on."""
        self._receipt.tell_staged(self._staged.staged)
        timed = self._homeserver.metrics.timed
        self._receipt.check_transactions(timed("receipt", "transaction", self.check))

    async def check(self, transaction: Transaction) -> Refusal | None:
        """The refusal of the transaction, or None to accept it.

        PDUs that are not sticky, or not any more, are not charged.
        """
        origin = transaction.origin
        if self._is_exempt_server(origin):
            return None
        claims = [_claim(pdu, origin) for pdu in transaction.pdus if self._is_unexpired(pdu)]
        if not claims:
            return None
        refusal = await self._too_many(origin, claims)
        if refusal is None and not self._limits_transactions(origin):
            return None
        if await self._receipt.is_answered(origin, transaction.transaction_id):
            return None
        refusal = refusal or self._past_a_limit(transaction, claims)
        if refusal is not None:
            self._report.refused(
                refusal.limit, origin, _where(claims), refusal.retry_after_ms, len(claims)
            )
        return refusal

    async def _too_many(self, origin: str, claims: list[_Claim]) -> Refusal | None:
        """Are too many events of the origin deferred or staged already?"""
        is_held = origin in self._orders.held_servers
        if not is_held and self._slack.take(origin, len(claims)):
            return None
        counts_deferred = await self._has_deferred_table()
        room_ids = {room_id for room_id, _ in claims if room_id}

        def find_txn(txn: Cursor) -> Refusal | None:
            most = most_deferred(self._config, is_held=is_held)
            most_in_room = self._config.max_staged_per_server_in_room
            # Of a held server nothing is released, so it does not matter how many too many wait.
            count_up_to = most if is_held else 2 * most
            deferred = self._deferred.count_txn(txn, origin, count_up_to) if counts_deferred else 0
            if deferred >= most:
                wait_ms = self._until_released_ms(deferred - most + 1)
                if is_held:
                    wait_ms = _RETRY_MAX_MS
                return Refusal("max_deferred_per_server", _retry_after_ms(wait_ms))
            at_most = min(most - deferred, most_in_room) - 1
            if not is_held and self._staged.are_few_txn(txn, origin, at_most // 2):
                self._slack.found(origin, at_most - at_most // 2 - len(claims))
                return None
            if not self._staged.look_txn(txn, origin, at_most):
                return None
            # The limits that are passed, and when each is not any more.
            waits_ms: list[tuple[str, int]] = []
            if excess := self._staged.excess_txn(txn, origin, None, most - deferred):
                wait_ms = self._until_processed_or_expired_ms(excess)
                if deferred >= excess.number:
                    wait_ms = min(wait_ms, self._until_released_ms(excess.number))
                waits_ms.append(("max_deferred_per_server", wait_ms))
            for room_id in room_ids:
                if excess := self._staged.excess_txn(txn, origin, room_id, most_in_room):
                    wait_ms = self._until_processed_or_expired_ms(excess)
                    waits_ms.append(("max_staged_per_server_in_room", wait_ms))
            if not waits_ms:
                return None
            return Refusal(waits_ms[0][0], _retry_after_ms(max(ms for _, ms in waits_ms)))

        return await self._homeserver.transact_briefly("count_deferred", find_txn)

    def _until_released_ms(self, number: int) -> int:
        """How long it takes until so many of an origin's deferred events are released."""
        limits = (self._config.per_server, self._config.per_server_in_room)
        per_second = min((limit.per_second for limit in limits if limit), default=1.0)
        return round(number * 1000 / per_second)

    def _until_processed_or_expired_ms(self, excess: Excess) -> int:
        wait_ms = excess.ends_ms - self._homeserver.now_ms()
        return min(wait_ms, excess.number * _PROCESSING_MS) if excess.is_moving else wait_ms

    async def _has_deferred_table(self) -> bool:
        """Is the table of deferred events there, in a layout that this version knows?"""
        # At the first start of all, this process may be faster than those that defer events.
        if self._has_table is None:
            await self._looking.run()
        return bool(self._has_table)

    async def _look_for_table(self) -> None:
        if self._has_table is not None:
            return
        try:
            await migrate(self._homeserver, self._deferred)
            self._has_table = True
        except NewerLayoutError as e:
            logger.error("receipt counts staged events only, not deferred ones: %s", e)
            self._has_table = False

    def _limits_transactions(self, origin: str) -> bool:
        is_held = origin in self._orders.held_servers
        return self._config.mode is Mode.REJECT and not is_held and self._limiter.is_whole

    def _past_a_limit(self, transaction: Transaction, claims: list[_Claim]) -> Refusal | None:
        origin = transaction.origin
        # The ID alone would not do: the origin may put other PDUs under it.
        receipt = (transaction.transaction_id, transaction.fingerprint())
        if self._charged.get(origin) == receipt:
            return None
        charged = [
            (room_id, None if sender and self._exempts(sender) else sender)
            for room_id, sender in claims
        ]
        refused = self._limiter.it.admit_transaction(origin, charged, self._homeserver.now_ms())
        if refused is not None:
            return Refusal(*refused)
        self._charged[origin] = receipt
        self._charged.move_to_end(origin)
        if len(self._charged) > _MAX_ORIGINS:
            self._charged.popitem(last=False)
        return None

    def _is_exempt_server(self, origin: str) -> bool:
        # What waits while a server is held has to have a bound.
        is_exempt = origin in self._orders.exempt_servers or self._is_exempt(origin)
        return is_exempt and origin not in self._orders.held_servers

    def _exempts(self, user_id: str) -> bool:
        return user_id in self._orders.exempt_users or self._is_exempt_user(user_id)

    def _is_unexpired(self, pdu: ReceivedPdu) -> bool:
        now_ms = self._homeserver.now_ms()
        until_ms = sticky_until_ms(pdu.sticky_field, pdu.origin_server_ts, now_ms)
        return until_ms is not None and now_ms < until_ms


def _retry_after_ms(wait_ms: int) -> int:
    return min(max(wait_ms, _RETRY_MIN_MS), _RETRY_MAX_MS)


def _claim(pdu: ReceivedPdu, origin: str) -> _Claim:
    room_id, sender = pdu.room_id, pdu.sender
    if not isinstance(room_id, str) or not _is_id(room_id):
        return None, None
    if not isinstance(sender, str) or not _is_id(sender):
        return room_id, None
    return room_id, sender if sender.partition(":")[2] == origin else None


def _is_id(name: str) -> bool:
    # No ID is longer, and none has half a character in it. So made-up ones cost no memory.
    return len(name) <= _MAX_ID_LENGTH and name.isprintable()


def _where(claims: list[_Claim]) -> str:
    rooms = sorted({room_id for room_id, _ in claims if room_id is not None})
    more = f" and {len(rooms) - 1} more rooms" if len(rooms) > 1 else ""
    return f"in {rooms[0]}{more}" if rooms else ""
