"""The port: everything that this project may ask of the homeserver, in its own words.

Handlers, the index follower and storage know these protocols only. The one implementation is
``synapse_sticky.adapter``; what it must do is said here, so that a later Synapse needs changes
in one place.

Transactions: functions that end in ``_txn`` run in a database thread and get a cursor; all else
runs in the reactor's thread.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
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

    def call_after(self, callback: Callable[..., object], /, *args: Any) -> None:
        """Calls back in the reactor's thread once the transaction is through: as often as this
        was asked for, earlier attempts of the same transaction included."""

    @property
    def rowcount(self) -> int: ...


class Signal(Protocol):
    """Something that any number may wait for, again and again."""

    def fire(self) -> None:
        """Wakes all who wait."""

    async def wait(self, at_most_ms: int) -> None:
        """Waits until it fires next, or until that long has passed."""


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
    """A server has newly joined a room (P3)."""

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


@attr.s(auto_attribs=True, frozen=True, slots=True)
class IncompletePdu:
    """A PDU that was acknowledged, and whose prev_events cannot be had for now."""

    origin: str
    event_id: str
    room_id: str
    event_json: str
    internal_metadata: str
    prev_event_ids: tuple[str, ...]


@attr.s(auto_attribs=True, frozen=True, slots=True)
class NewStickyEvent:
    """An event that is about to enter the sticky events stream."""

    event_id: str
    room_id: str
    sender: str
    expires_at_ms: int
    event_stream_ordering: int


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ReceivedPdu:
    """What is needed of a PDU with the sticky field as another server sent it: claims, all of
    them, and of any type."""

    room_id: object
    sender: object
    sticky_field: object
    origin_server_ts: object


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Transaction:
    """A ``/send`` transaction with at least one PDU that has the sticky field."""

    origin: str
    """Proven, by the request's signature."""
    transaction_id: str
    pdus: Sequence[ReceivedPdu]
    """Those with the sticky field."""
    fingerprint: Callable[[], bytes]
    """What tells these PDUs from any others."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Refusal:
    """Not now (429): the option whose limit is in the way, and when to try again."""

    limit: str
    retry_after_ms: int


@attr.s(auto_attribs=True, frozen=True, slots=True)
class LocalSend:
    """A local user's request to send a sticky event, now or with a delay."""

    user_id: str
    is_exempt: Callable[[], Awaitable[bool]]
    """Is this somebody whom Synapse does not limit: a server admin, an application service that
    is exempt, a user with such an override?"""
    is_repeated: Callable[[], Awaitable[bool]]
    """Was the very same request carried out before? Then it is only answered again."""


class Possession(Enum):
    """A remote server's answer to "do you have this event?"."""

    HAS = "has"
    LACKS = "lacks"
    REFUSES = "refuses to say"
    UNREACHABLE = "unreachable"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Position:
    """A position of the sticky events stream, which several writers may write to."""

    stream_id: int
    """The position of every writer that is not in ``writers``."""
    writers: Mapping[str, int] = attr.Factory(dict)
    """The positions of those that are further, by instance name."""

    def of(self, instance_name: str) -> int:
        """The position of this writer."""
        return self.writers.get(instance_name, self.stream_id)

    def is_before_or_at(self, other: "Position") -> bool:
        """Is no writer further here than there?"""
        return self.stream_id <= other.stream_id and all(
            self.of(writer) <= other.of(writer) for writer in {*self.writers, *other.writers}
        )


class StickyStream(Protocol):
    """Synapse's sticky events stream, as seen by this process."""

    writers: Sequence[str]
    """The instances that write to it."""

    def positions(self) -> dict[str, int]:
        """Up to where each writer's rows are visible here, by instance name."""

    async def rows(self, *, after: int, up_to: int, limit: int) -> list[StickyRow]:
        """Unexpired rows with ``after < stream_id <= up_to``, ascending, at most ``limit``."""

    async def rows_of(self, event_ids: Collection[str]) -> list[StickyRow]:
        """The present rows of these events; an event without a row is left out."""

    async def last_rows(self, room_id: str) -> dict[str, int]:
        """The last stream ID that each writer has given to an unexpired row of the room's own
        events, by instance name: as the database has it, which this process may see later."""

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
        """One page of new joins of servers, and the position that it reaches to.

        A join counts if no other user of that server has been joined since before. Joins that
        were received before ``not_before_ms`` are left out. This server's own joins are among
        them, and those that it missed if it left the room after ``not_before_ms`` and is back.
        """

    async def is_joined(self, room_id: str, server: str) -> bool:
        """Is the server joined now, as far as this homeserver knows, and not denied by the
        room's ACL?"""

    async def is_in_room(self, room_id: str) -> bool:
        """Is this server in the room, by what the database says at this moment?"""

    async def is_user_joined(self, room_id: str, user_id: str) -> bool:
        """Is this local user joined now?"""

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

    def on_caught_up(self, callback: Callable[[str], None]) -> None:
        """Calls back with a destination to which Synapse, catching up after an outage, skipped
        events; sticky ones among them are in its backlog by then."""

    def on_noted(self, callback: Callable[[str], None]) -> None:
        """Calls back with a destination once Synapse has noted up to where its ordinary queue got
        to it, and whenever it has got further: from there it goes on after a restart."""

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

    def process_what_is_left(self) -> None:
        """Begins at once with what an earlier run left in the area, in a process that receives
        transactions. Synapse itself waits for the next transaction of anybody."""

    async def process(self, room_id: str) -> None:
        """Begins with what is in the area of the room, unless that is under way."""

    def set_aside(self, take: Callable[[IncompletePdu, StagedEvent, str], Awaitable[None]]) -> None:
        """Hands over each sticky PDU that Synapse drops as it cannot be persisted for now or its
        prev_events cannot be fetched, or as this server is not in the room, which it may be about
        to join; and says which. So with those that it holds in memory only while it joins. None
        that can never be taken in, nor any that is larger than a PDU may be."""

    def holds_up(self, room_id: str) -> bool:
        """Does this process hold up what is staged for the room, as it is joining it?"""

    def stage_txn(self, txn: Cursor, room_id: str, pdus: Sequence[IncompletePdu]) -> None:
        """Puts PDUs of the room into the area, in this order, behind those that are there; none if
        the room is gone."""

    async def persisted(self, event_ids: Collection[str]) -> set[str]:
        """Those of the events that are here, and in full."""

    def retry_processing(self, again: Callable[[StagedEvent, int], int | None]) -> None:
        """When the database fails as a PDU is processed, or the event persister is away, asks with
        how many failures there have been how many ms later to try again; None leaves it to Synapse,
        which drops the PDU."""


class Inbound(Protocol):
    """Transactions of other servers, in a process that receives them."""

    receives: bool
    """Whether other servers can reach this process at all."""

    def check_transactions(self, check: Callable[[Transaction], Awaitable[Refusal | None]]) -> None:
        """Asks before Synapse touches a transaction with the sticky field in it; one that is
        refused leaves no trace. If ``check`` fails, the transaction is let through (fail open)."""

    async def answered(self, origin: str, transaction_id: str) -> bool:
        """Was this transaction answered before? Then Synapse repeats its answer."""

    def staged_txn(self, txn: Cursor, origin: str, at_most: int) -> int:
        """How many PDUs of the origin with the sticky field are staged. Up to ``at_most`` the
        answer may be too large: then it says no more than that there are not more."""


class StickyWriter(Protocol):
    """Entering events into the sticky events stream, in a process that persists events."""

    writes: bool
    """Whether this process persists events at all."""

    def handles(self, room_id: str) -> bool:
        """Does this very process persist the room's events?"""

    def hold_back(
        self, hold_txn: Callable[[Cursor, Sequence[NewStickyEvent]], Collection[str]]
    ) -> None:
        """Asks, within the transaction that would enter deliverable events into the stream, for
        the IDs of those that are not to be entered for now. It may be asked again for the same
        ones if the transaction is tried again.

        An error of the database fails the transaction, as it would without. Anything else that
        fails is logged, and the events are entered (fail open).
        """

    def enter_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> None:
        """Enters events into the stream as new, in this order. One that is gone from the database
        is left out."""

    async def still_sticky(self, event_ids: Collection[str]) -> set[str]:
        """Those of the events that are there and are neither redacted, rejected nor
        soft-failed."""

    def wake(self, room_ids: Collection[str]) -> None:
        """Answers the waiting syncs of those who are joined to the rooms."""


class Sending(Protocol):
    """Events that this server's users send, in a process that serves clients."""

    serves_clients: bool
    """Whether clients can reach this process at all."""

    def limit_sticky(self, check: Callable[[LocalSend], Awaitable[Refusal | None]]) -> None:
        """Asks before a sticky event is sent, or a delayed one is scheduled; not again when that
        becomes due. If ``check`` fails, the event is let through (fail open)."""

    def accept_sticky_state(self) -> None:
        """Takes the parameter for stickiness with state events as well (S3)."""


DeliverySource = Callable[
    [Collection[str], Position, Position, int, int | None],
    tuple[dict[str, list[str]], int, int | None] | None,
]
"""``(room_ids, after, up_to, now_ms, limit)`` to the IDs of the deliverable, unexpired events of
the rooms after one position (exclusive) and up to another (inclusive): by room, in stream order;
with how many they are, and the stream ID of the last. None for "ask the database"."""


class SlidingRequest(Protocol):
    """A request of sliding sync that asks for sticky events."""

    connection: tuple[str, str, str]
    """Whose it is: user ID, device ID, and the client's name for the connection."""
    room_ids: AbstractSet[str]
    """The rooms that the user is joined to and that the client's lists could match (D2, D8)."""
    limit: int
    """The most events that the client takes."""
    since: Position | None
    """Up to where the client has been told of; None for nothing."""
    up_to: Position
    """Up to where this response may go."""

    async def newly_joined_rooms(self) -> AbstractSet[str]:
        """Rooms that the connection did not have at its last request, so that ``since`` says
        nothing of them."""

    async def read(
        self, room_ids: Collection[str], after: Position, up_to: Position, limit: int | None
    ) -> tuple[int, Position]:
        """Puts these rooms' events into the response, the earliest first, at most ``limit``.

        Gives how many, and up to where it came (at least ``up_to`` if there were not more).
        """


@attr.s(auto_attribs=True, frozen=True, slots=True)
class SlidingPage:
    """What goes out with the events that were read."""

    next_batch: Position
    is_due: bool
    """Whether the client must be told the token at once, even if there is no event with it."""


SlidingPager = Callable[[SlidingRequest], Awaitable[SlidingPage]]
"""Reads into a response what belongs there."""


class Delivery(Protocol):
    """What a user's sync is given in its sections of sticky events."""

    def answer_from(
        self, source: DeliverySource, catch_up: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """From now on /sync and sliding sync get their sticky events from ``source``.

        If it has no answer, it is asked once more after ``catch_up``. If it fails or has none
        again, Synapse's own query serves, without what was redacted (fail open).
        """

    def page_sliding_sync(self, page: SlidingPager) -> None:
        """From now on ``page`` decides what a response of sliding sync has in this section.

        If it fails, the request fails, and nothing is lost to the client, which asks again.
        """


ServerVisibility = Callable[[str, Sequence[Any]], Awaitable[set[str]]]
"""``(server, events)`` to the event IDs that it may see whole although history visibility
filtered them."""


UserVisibility = Callable[[str, Sequence[Any]], Awaitable[set[str]]]
"""The same for ``(user_id, events)``: what a local user may see, or may not."""


class Visibility(Protocol):
    """What other servers and local users may see."""

    def allow_servers(self, allowed: ServerVisibility) -> None:
        """Lets joined servers see more than history visibility gives (C1).

        If ``allowed`` fails, nothing is added (fail closed).
        """

    def hide_from_users(self, hidden: UserVisibility) -> None:
        """Keeps from users what is only for those who are joined (D8): asks for the sticky events
        of what a user is about to be shown and was not joined at.

        If ``hidden`` fails, all of them are kept from the user (fail closed).
        """

    def allow_users(self, allowed: UserVisibility) -> None:
        """Lets joined users see more than history visibility gives, where they ask for events
        one by one or page through a room (C1); not those of users whom they ignore.

        If ``allowed`` fails, nothing is added (fail closed).
        """


class Extremities(Protocol):
    """Forward extremities, in a process that may merge them."""

    merges: bool
    """Whether that is for this process to do, and allowed."""
    threshold: int
    """How many a room may have."""

    async def count(self, room_id: str) -> int:
        """How many the room has."""

    async def merge(self, room_id: str) -> bool:
        """Sends a dummy event on top of the latest ten, in the name of some local user. Whether
        there was one who may send it."""


class Homeserver(Protocol):
    """The running homeserver process."""

    server_name: str
    instance_name: str
    stream: StickyStream
    rooms: Rooms
    federation: Federation
    staging: Staging
    visibility: Visibility
    inbound: Inbound
    writer: StickyWriter
    sending: Sending
    delivery: Delivery
    extremities: Extremities

    def now_ms(self) -> int: ...

    def in_background(
        self, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        """Runs the coroutine function by itself; an exception ends up in the log."""

    def call_later(
        self, delay_ms: int, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> Cancellable: ...

    def new_signal(self) -> Signal: ...

    async def sleep_ms(self, delay_ms: int) -> None: ...

    async def transact(self, what: str, function: Callable[..., T], *args: Any) -> T:
        """Runs ``function(cursor, *args)`` in one transaction; retried if the database asks."""

    async def transact_alone(self, what: str, function: Callable[[Cursor], T]) -> T:
        """The same, in one process at a time; each sees what those before it have done."""
