"""The Rust core: what is sticky and until when, an index of the sticky events, rate limits, and the
order in which deferred events are released.

The core has no clock and no I/O. Time is always an argument, in integer milliseconds since the Unix
epoch, and its name ends in ``_ms``. Every function raises ``TypeError`` for an argument of the
wrong type (a ``bool`` is not an ``int``) and ``ValueError`` for one with an unusable value. The
error names the argument, and the call has changed nothing. An ``int`` has at most 64 bits.

A panic, which is a bug, raises ``PanickedError``. The object whose call it was may have changed in
any way, and from then on each of its calls raises it. Its ``on_panic``, if it has one, is called
once with the message, within the call that panicked: it must not use the object.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, final

__all__ = [
    "MAX_STICKY_DURATION_MS",
    "Limiter",
    "PanickedError",
    "ReleaseQueue",
    "StickyIndex",
    "sticky_until_ms",
]

MAX_STICKY_DURATION_MS: Final[int]
"""The longest time that an event can be sticky, one hour (MSC4354; S1)."""

class PanickedError(RuntimeError):
    """The Rust core has panicked."""

def sticky_until_ms(field: object, origin_server_ts: object, received_ts_ms: int) -> int | None:
    """When an event stops being sticky, in ms since the epoch; ``None`` if it is not sticky
    (MSC4354; S1, S2). An event is sticky while this time is later than now.

    Never raises for a ``field`` or an ``origin_server_ts`` that JSON can hold. Both may contain
    ints of any size; the nearest of 64 bits counts.

    Args:
        field: the value of the event's top-level ``msc4354_sticky``, of any type; ``None`` if the
            event has no such field. The event is sticky only if this is a mapping whose
            ``duration_ms`` is an ``int`` of 0 or more. More than an hour counts as an hour.
        origin_server_ts: when the sender claims to have sent the event, of any type. The event is
            sticky only if this is an ``int``. A time in the future does not prolong stickiness.
        received_ts_ms: when this server received the event.
    """

@final
class StickyIndex:
    """The unexpired sticky events of all rooms, in stream order, in memory.

    Every list leaves out expired rows at once; ``expire`` drops them later. Stream IDs are unique
    across writers. If two rows share one all the same, the index keeps and lists both, in either
    order.
    """

    def __new__(
        cls, server_name: str, *, on_panic: Callable[[str], object] | None = None
    ) -> StickyIndex:
        """Creates an empty index.

        Args:
            server_name: the name of this server. An event is this server's own if the sender's
                domain equals it. The domain is what follows the first colon of the user ID. A
                sender without a colon belongs to no server.

        Raises:
            ValueError: ``server_name`` is empty.
        """

    def insert(
        self,
        rows: Iterable[
            tuple[int, str, str, str, str, int]
            | tuple[int, str, str, str, str, int, int | None, int, int]
        ],
    ) -> None:
        """Inserts all rows, or none if one is bad.

        If the index already has a row of the same event, the row with the higher ``stream_id``
        stays. So the caller may insert rows again, in any order.

        Args:
            rows: tuples ``(stream_id, instance_name, room_id, event_id, sender, expires_at_ms)``,
                which three more may follow. ``key``: what the event is the state of, hashed;
                ``None`` or 0 if that cannot be read, as without them. ``newness_ms``: the end that
                the sender claims, else ``expires_at_ms``. ``size_bytes``: of the event's JSON, else
                0.

        Raises:
            MemoryError: the index has 2^32 - 1 rows. It has inserted the rows before this one.
        """

    def remove(self, event_id: str) -> bool:
        """Drops an event. Returns whether the index had it."""

    def expire(self, now_ms: int, max_rows: int) -> int:
        """Drops rows with ``expires_at_ms <= now_ms``, at most ``max_rows``, the oldest expiry
        first. Returns how many it dropped. Fewer than ``max_rows`` means that none is left."""

    def advance(self, instance_name: str, stream_id: int) -> None:
        """Notes that the caller has inserted all rows of this writer up to and including
        ``stream_id``. The position never goes back."""

    def positions(self) -> dict[str, int]:
        """A copy of the position of each writer that ``advance`` has named."""

    def in_step(self, positions: Mapping[str, int]) -> bool:
        """Whether the index has reached each of these positions. A writer that ``advance`` has not
        named is at 0."""

    def events_in_rooms(
        self,
        room_ids: Collection[str],
        from_stream_id: int,
        from_positions: Mapping[str, int],
        to_stream_id: int,
        to_positions: Mapping[str, int],
        now_ms: int,
        limit: int | None,
    ) -> list[tuple[int, str, str]]:
        """The unexpired events of these rooms after one position and up to another.

        The two positions are those of a ``MultiWriterStreamToken``. The position of a writer is its
        own in ``..._positions`` if it has one, else ``..._stream_id``, and never below the latter.

        The cost follows the number of rooms or the number of rows in the range, whichever is
        smaller. If the range has no row, the call does not look into ``room_ids``. (So an item of
        ``room_ids`` that is not a ``str`` raises ``TypeError`` in some calls, and matches nothing
        in others.)

        Args:
            room_ids: a ``set`` or ``frozenset`` is used as it is. The call copies any other
                collection before it looks into it.
            from_stream_id, from_positions: exclusive.
            to_stream_id, to_positions: inclusive.
            now_ms: events with ``expires_at_ms <= now_ms`` are left out.
            limit: the maximum number of events, 0 or more; ``None`` for all.

        Returns:
            tuples ``(stream_id, room_id, event_id)``, by ascending ``stream_id``.
        """

    def events_by_room(
        self,
        room_ids: Collection[str],
        from_stream_id: int,
        from_positions: Mapping[str, int],
        to_stream_id: int,
        to_positions: Mapping[str, int],
        now_ms: int,
        limit: int | None,
    ) -> tuple[dict[str, list[str]], int, int | None]:
        """The events of ``events_in_rooms``, by room. This is faster if there are many.

        Returns:
            the event IDs of each room in stream order, by room ID, in the order of the rooms' first
            events; the number of events; and the ``stream_id`` of the last of them, ``None`` if
            there is no event.
        """

    def present_by_room(
        self,
        room_ids: Collection[str],
        to_stream_id: int,
        to_positions: Mapping[str, int],
        now_ms: int,
        max_events: int,
        max_bytes: int,
        max_keys: int,
        max_oldest: int,
    ) -> tuple[dict[str, list[str]], int | None]:
        """What is given first to somebody who has none of these rooms' unexpired events up to a
        position (D4, D5).

        That is all of them, if they are not too many. Else it is the newest event of each key, and
        some of the oldest events. A key is the state of its sender in its room. An event without a
        readable one is a key of its own. The newest event of a key is the one with the latest
        ``newness_ms``, then with the greatest event ID. If there are too many keys as well, rooms
        take turns, then the servers of a room, then the senders of a server, each with its newest
        key first.

        Args:
            room_ids, to_stream_id, to_positions, now_ms: as above.
            max_events, max_bytes: the most that is given.
            max_keys: so many of a sender in a room, if not all is given.
            max_oldest: so many of ``max_events`` are for the oldest events. The first of all is
                given in any case.

        Returns:
            the event IDs of each room in stream order, by room ID; and the ``stream_id`` up to
            which all events are among them, ``None`` if all are.
        """

    def own_events(
        self, room_id: str, from_stream_id: int, now_ms: int, limit: int
    ) -> list[tuple[int, str, str]]:
        """This server's own unexpired events of a room from ``from_stream_id`` (inclusive), at most
        ``limit``. The events of other servers cost nothing, however many the room has.

        Returns:
            tuples ``(stream_id, event_id, sender)``, by ascending ``stream_id``.
        """

    def server_count(self, room_id: str, now_ms: int) -> int:
        """How many different servers sent the room's unexpired events."""

    def get(self, event_id: str) -> tuple[int, str, str, str, int] | None:
        """``(stream_id, room_id, event_id, sender, expires_at_ms)`` of an event, even of an expired
        one that the index has not dropped yet; ``None`` if the index does not have the event."""

    def __len__(self) -> int:
        """How many rows the index has, with the expired ones that it has not dropped yet."""

    def __contains__(self, event_id: str, /) -> bool:
        """Whether the index has the event, even an expired one that it has not dropped yet."""

@final
class Limiter:
    """Buckets that refill steadily (GCRA). A decision charges several buckets or none (L1, L6).

    Memory is bounded: keys beyond ``capacity`` share buckets, which a secret hash picks. A clock
    that is set back neither fills a bucket nor stops its refill.
    """

    def __new__(
        cls,
        limits: Mapping[str, tuple[float, int]],
        capacity: int,
        *,
        on_panic: Callable[[str], object] | None = None,
    ) -> Limiter:
        """Creates a limiter whose buckets are all full.

        Args:
            limits: tuples ``(per_second, burst_count)`` by name: ``per_server``,
                ``per_server_in_room``, ``per_sender``, ``per_room``, ``per_user``. A name that is
                missing has no limit. ``per_second`` is from 0.001 to 1,000,000, ``burst_count``
                from 1 to 1,000,000.
            capacity: how many keys may have their own bucket.
        """

    def admit_transaction(
        self, origin: str, pdus: Iterable[tuple[str | None, str | None]], now_ms: int
    ) -> tuple[str, int] | None:
        """Charges all of the sticky PDUs of a transaction, or none (L2).

        Each PDU is charged to the origin. If it has a room ID, it is also charged to the origin in
        that room. If it has a sender as well, it is also charged to that sender in that room. If a
        transaction has more PDUs than a bucket holds, it is admitted once that bucket is full.

        Args:
            pdus: tuples ``(room_id, sender)``, each ``None`` if this server cannot believe it.

        Returns:
            ``None`` if admitted, else the name of the limit that refuses for the longest time, and
            the ms until it would admit the same, at least 1.
        """

    def admit_user(self, user_id: str, now_ms: int) -> tuple[str, int] | None:
        """Charges an event of a local user (E1). Returns the same as ``admit_transaction``."""

    def __len__(self) -> int:
        """How many keys have their own bucket now."""

@final
class ReleaseQueue:
    """The deferred events, in the order of their release (L4, D7).

    Rooms take turns. The servers of a room take turns. A server's turn in a room goes to the sender
    who has the earliest deadline, and of that sender's events to the newest of a key. Its keys take
    turns, an event without one is a key of its own. Superseded events follow. While an event would
    expire before all that waits of its server in the room is through, the one that expires first
    has every other turn. A server that has reached its own limit is skipped. If a call that is
    given a limiter panics, neither of the two is of use any more.
    """

    def __new__(cls, *, on_panic: Callable[[str], object] | None = None) -> ReleaseQueue: ...
    def admit(
        self,
        limiter: Limiter,
        room_id: str,
        server: str,
        sender: str,
        now_ms: int,
        *,
        is_exempt: bool = ...,
    ) -> str | None:
        """Charges a new event if it may be delivered now. It may not overtake a deferred event that
        needs the same allowance.

        Args:
            is_exempt: the limit on a sender does not apply.

        Returns:
            ``None`` if the event was charged, else the name of the limit that refused it. The queue
            does not add the event.
        """

    def add(
        self,
        event_id: str,
        room_id: str,
        server: str,
        sender: str,
        expires_at_ms: int,
        *,
        key: int | None = None,
        newness_ms: int | None = None,
        is_exempt: bool = ...,
    ) -> bool:
        """Defers the event. Returns ``False`` if it is deferred already.

        Args:
            key: what the event is the state of, hashed; ``None`` if that cannot be read.
            newness_ms: the end that the sender claims. Of a key the event with the latest is the
                newest. ``expires_at_ms`` if it is not known.
            is_exempt: the limit on a sender does not apply.
        """

    def remove(self, event_id: str) -> bool:
        """Takes the event out. Returns ``False`` if it is not deferred."""

    def take(self, limiter: Limiter, now_ms: int, max_events: int) -> list[str]:
        """Takes out the events that are released now, at most ``max_events``, and charges them.
        Returns their IDs in the order of release."""

    def expire(self, now_ms: int, max_events: int) -> list[str]:
        """Takes out the events that have expired, at most ``max_events``. Returns their IDs."""

    def next_due_ms(self, now_ms: int) -> int | None:
        """When there may be an event to take or to expire, ``now_ms`` at the earliest; ``None`` if
        no event is deferred."""

    def waiting(self, server: str) -> int:
        """How many events of the server are deferred."""

    def __len__(self) -> int: ...
    def __contains__(self, event_id: str, /) -> bool: ...
