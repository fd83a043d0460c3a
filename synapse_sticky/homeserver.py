"""The port: everything that this project may ask of the homeserver, in its own words.

Handlers, the index follower and storage know these protocols only. The one implementation is
``synapse_sticky.adapter``; what it must do is said here, so that a later Synapse needs changes
in one place.

Transactions: functions that end in ``_txn`` run in a database thread and get a cursor; all else
runs in the reactor's thread.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from enum import Enum
from typing import Any, Protocol, TypeVar

import attr

T = TypeVar("T")


class Cursor(Protocol):
    """A database cursor with ``?`` placeholders, whatever the database."""

    def execute(self, sql: str, parameters: Any = ..., /) -> None: ...
    def execute_batch(self, sql: str, args: Any, /) -> None: ...
    def fetchone(self) -> tuple[Any, ...] | None: ...
    def fetchall(self) -> list[tuple[Any, ...]]: ...

    @property
    def rowcount(self) -> int: ...


class Cancellable(Protocol):
    """A call that is due later."""

    def cancel(self) -> None: ...
    def active(self) -> bool: ...


@attr.s(auto_attribs=True, frozen=True, slots=True)
class StickyRow:
    """One row of the sticky events stream."""

    stream_id: int
    instance_name: str
    room_id: str
    event_id: str
    sender: str
    expires_at_ms: int
    deliverable: bool
    """False while the event is soft-failed, and for good once it is redacted or gone."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ServerJoin:
    """A remote server has newly joined a room (P3)."""

    destination: str
    room_id: str


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Batch:
    """Own sticky events of one room that go to a destination in one transaction.

    ``position`` is a position of the sticky events stream; everything at or below it is done
    with for this destination and room. ``event_ids`` are in stream order.
    """

    room_id: str
    position: int
    event_ids: list[str]


@attr.s(auto_attribs=True, frozen=True, slots=True)
class StagedEvent:
    """What the staging area's rules need of a PDU that waits there."""

    event_id: str
    sticky_field: object
    """The value of the PDU's sticky field as it was received, None if there is none."""
    origin_server_ts: object
    """As it was received: a claim, and not surely a number."""
    received_ts_ms: int


class Possession(Enum):
    """A remote server's answer to "do you have this event?"."""

    HAS = "has"
    LACKS = "lacks"
    REFUSES = "refuses to say"
    UNREACHABLE = "unreachable"


class StickyStream(Protocol):
    """Synapse's sticky events stream, as seen by this process."""

    def positions(self) -> dict[str, int]:
        """Up to where each writer's rows are visible here, by instance name."""

    async def rows(self, *, after: int, up_to: int, limit: int) -> list[StickyRow]:
        """Unexpired rows with ``after < stream_id <= up_to``, ascending, at most ``limit``."""

    async def rows_of(self, event_ids: Collection[str]) -> list[StickyRow]:
        """The present rows of these events; an event without a row is left out."""

    def on_advance(self, callback: Callable[[], None]) -> None:
        """Calls back whenever any of Synapse's streams may have advanced."""

    def on_event_changed(self, callback: Callable[[str], None]) -> None:
        """Calls back with an event ID: redacted, purged or changed in its metadata."""

    def on_room_purged(self, callback: Callable[[str], None]) -> None:
        """Calls back with a room ID whose events may be gone."""


class Rooms(Protocol):
    """Who is in a room, and who may get its events."""

    def state_position(self) -> int:
        """Up to where state changes are visible here (position of the events stream)."""

    async def server_joins(
        self, *, after: int, up_to: int, not_before_ms: int
    ) -> tuple[int, list[ServerJoin]]:
        """One page of new joins of remote servers, and the position that it reaches to.

        A join counts if no other user of that server has been joined since before. Joins that
        were received before ``not_before_ms`` are left out.
        """

    async def is_joined(self, room_id: str, server: str) -> bool:
        """Is the server joined now, as far as this homeserver knows, and not denied by the
        room's ACL?"""

    async def may_receive(self, room_id: str, destination: str) -> bool:
        """May the destination get own events of this room now: is this server in the room, the
        destination too, the ACL and the federation whitelist in favour?"""

    async def erased(self, user_ids: Collection[str]) -> set[str]:
        """Those of the users who asked for the erasure of their data (P6)."""


BacklogSource = Callable[[str, int], Awaitable[Batch | None]]
"""``(destination, limit)`` to the next batch for it, or None if there is none for now."""


class Federation(Protocol):
    """Sending to other servers, in a process that does so."""

    sends: bool
    """Whether this process sends federation traffic at all."""

    def handles(self, destination: str) -> bool:
        """Does this very process send to the destination, and is federation with it allowed?"""

    def wake(self, destination: str) -> None:
        """Looks for something to send to the destination, unless it is backed off."""

    async def retry_at_ms(self, destination: str) -> int:
        """When the destination's back-off ends (ms since the epoch; 0 if there is none)."""

    async def has_event(self, destination: str, event_id: str) -> Possession:
        """Asks the destination for the event (federation ``/event``)."""

    def on_acknowledged(
        self, callback: Callable[[str, Sequence[tuple[str, str]]], Awaitable[None]]
    ) -> None:
        """Calls back with a destination and the ``(room_id, event_id)`` that it acknowledged by
        event ID and without error in its answer to ``/send`` (P7)."""

    def serve_backlog_from(self, source: BacklogSource) -> None:
        """From now on the backlog of sticky events of every destination comes from ``source``.

        If the source fails, Synapse's own selection serves (fail open).
        """

    def backlog_txn(self, txn: Cursor, destination: str) -> list[tuple[str, int]]:
        """Synapse's note of what is still to be sent: ``(room_id, position)``, inclusive."""

    def lower_backlog_txn(self, txn: Cursor, destination: str, room_id: str, position: int) -> None:
        """Notes the room as backlogged from ``position``, unless it is from further back."""

    def clear_backlog_txn(self, txn: Cursor, destination: str, room_id: str, position: int) -> None:
        """Drops the room's note, unless it is from before ``position``."""


class Staging(Protocol):
    """The staging area of inbound PDUs."""

    def keep_from_pruning(self, keep: Callable[[StagedEvent], bool]) -> None:
        """PDUs for which ``keep`` is true are left when Synapse prunes the area (L3)."""


ServerVisibility = Callable[[str, Sequence[Any]], Awaitable[set[str]]]
"""``(server, events)`` to the event IDs that it may see whole although history visibility
filtered them."""


class Visibility(Protocol):
    """What other servers may see."""

    def allow_servers(self, allowed: ServerVisibility) -> None:
        """Lets joined servers see more than history visibility gives (C1).

        If ``allowed`` fails, nothing is added (fail closed).
        """


class Homeserver(Protocol):
    """The running homeserver process."""

    server_name: str
    instance_name: str
    stream: StickyStream
    rooms: Rooms
    federation: Federation
    staging: Staging
    visibility: Visibility

    def now_ms(self) -> int: ...

    def in_background(
        self, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        """Runs the coroutine function by itself; an exception ends up in the log."""

    def call_later(
        self, delay_ms: int, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> Cancellable: ...

    async def sleep_ms(self, delay_ms: int) -> None: ...

    async def transact(self, what: str, function: Callable[..., T], *args: Any) -> T:
        """Runs ``function(cursor, *args)`` in one transaction; retried if the database asks."""

    def lock_migrations_txn(self, txn: Cursor) -> None:
        """Keeps other processes' migrations out until the transaction ends."""
