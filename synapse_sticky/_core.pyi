"""The Rust core: what is sticky and until when, an index of the sticky events there are, limits on
how fast they come, and the order in which those that wait are released.

No clock, no I/O: time is always an argument, in integer milliseconds since the Unix epoch, and
named ``_ms``. Every function raises ``TypeError`` for an argument of the wrong type (a ``bool`` is
not an ``int``) and ``ValueError`` for one that cannot be used, naming it, and has then changed
nothing. An ``int`` has at most 64 bits unless said otherwise.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Final, final

__all__ = [
    "MAX_STICKY_DURATION_MS",
    "Limiter",
    "ReleaseQueue",
    "StickyIndex",
    "sticky_duration_ms",
    "sticky_until_ms",
]

MAX_STICKY_DURATION_MS: Final[int]
"""The longest that an event can be sticky, one hour (MSC4354; S1)."""

def sticky_duration_ms(field: object, /) -> int | None:
    """How long an event asks to be sticky, in ms, or ``None`` if it is not sticky (MSC4354; S1).

    Never raises for what JSON can hold.

    Args:
        field: the value of the event's top-level ``msc4354_sticky``, whatever it is; ``None`` if
            there is none. Only a mapping whose ``duration_ms`` is an ``int`` of 0 or more will
            do; one over the hour counts as the hour, however large.
    """

def sticky_until_ms(duration_ms: int, origin_server_ts_ms: int, received_ts_ms: int) -> int:
    """When an event stops being sticky, in ms since the epoch; it is sticky while that is later
    than now (MSC4354; S2).

    Ints of any size are taken, the sum included: the nearest of 64 bits counts.

    Args:
        duration_ms: what it asks for; held to 0 to ``MAX_STICKY_DURATION_MS``.
        origin_server_ts_ms: when its sender says it was sent. A future one prolongs nothing.
        received_ts_ms: when this server received it.
    """

@final
class StickyIndex:
    """The unexpired sticky events of all rooms, in stream order, in memory.

    Rows that have expired are left out of every list at once, and really dropped by ``expire``.
    Stream IDs are unique across writers; should two rows share one all the same, both are kept and
    listed, in either order.
    """

    def __new__(cls, server_name: str) -> StickyIndex:
        """An empty index.

        Args:
            server_name: this server. An event is its own if the sender's domain, all that follows
                the first colon of the user ID, equals it. A sender without one is nobody's.

        Raises:
            ValueError: ``server_name`` is empty.
        """

    def insert(self, rows: Iterable[tuple[int, str, str, str, str, int]]) -> None:
        """Takes rows in: all of them, or none if one is bad.

        If a row's event is there already, the row with the higher ``stream_id`` stays: rows can be
        read again, in any order.

        Args:
            rows: ``(stream_id, instance_name, room_id, event_id, sender, expires_at_ms)`` each.

        Raises:
            MemoryError: there are 2^32 - 1 rows. Those before it have been taken in.
        """

    def remove(self, event_id: str) -> bool:
        """Drops an event. Whether it was there."""

    def remove_room(self, room_id: str) -> int:
        """Drops all events of a room. How many there were. Takes as long as there are many."""

    def expire(self, now_ms: int, max_rows: int) -> int:
        """Drops at most ``max_rows`` of the rows with ``expires_at_ms <= now_ms``, the oldest
        expiry first. How many they were: fewer than ``max_rows`` means that no more are left."""

    def advance(self, instance_name: str, stream_id: int) -> None:
        """Says that all rows of this writer up to and including ``stream_id`` have been taken in.
        Never goes back."""

    def positions(self) -> dict[str, int]:
        """Up to where each writer that ``advance`` has named has been taken in; a copy."""

    def in_step(self, positions: Mapping[str, int]) -> bool:
        """Has each of these writers been taken in up to and including its position? One that
        ``advance`` has not named is at 0."""

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

        The two are those of a ``MultiWriterStreamToken``: the position of a writer is the one of
        its own in ``..._positions``, else ``..._stream_id``, and never below that.

        The cost follows the smaller of the number of rooms asked for and of the rows in the range;
        with nothing new the rooms are not looked at. (So an item of ``room_ids`` that is no
        ``str`` raises ``TypeError`` in some calls, and in others is merely never found.)

        Args:
            room_ids: a ``set`` or ``frozenset`` is used as it is, another copied when looked at.
            from_stream_id, from_positions: exclusive.
            to_stream_id, to_positions: inclusive.
            now_ms: events with ``expires_at_ms <= now_ms`` are left out.
            limit: the most to return, 0 or more; ``None`` for all.

        Returns:
            ``(stream_id, room_id, event_id)`` each, by ascending ``stream_id``.
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
        """The events of ``events_in_rooms``, by room; the faster way if there are many.

        Returns:
            The event IDs of each room in stream order, by room ID in the order of the first event
            of each; how many there are; and the ``stream_id`` of the last of them all, ``None`` if
            there is none.
        """

    def own_events(
        self, room_id: str, from_stream_id: int, now_ms: int, limit: int
    ) -> list[tuple[int, str, str]]:
        """This server's own unexpired events of a room, from ``from_stream_id`` (inclusive), at
        most ``limit``. The events of others cost nothing, however many the room has.

        Returns:
            ``(stream_id, event_id, sender)`` each, by ascending ``stream_id``.
        """

    def servers_in_room(self, room_id: str, now_ms: int) -> list[str]:
        """The domains, sorted, of the senders of the room's unexpired events."""

    def get(self, event_id: str) -> tuple[int, str, str, str, int] | None:
        """``(stream_id, room_id, event_id, sender, expires_at_ms)``, even of an event that has
        expired but is not dropped yet; ``None`` if it is not there."""

    def __len__(self) -> int:
        """How many rows there are, expired ones that are not dropped yet among them."""

    def __contains__(self, event_id: str, /) -> bool:
        """Is the event there, if only expired and not dropped yet?"""

@final
class Limiter:
    """Buckets that refill steadily (GCRA), and decisions that take from several or from none
    (L1, L6).

    Memory is bounded: keys beyond ``capacity`` share buckets, picked by a secret hash. A clock that
    is set back neither fills a bucket nor holds it up.
    """

    def __new__(cls, limits: Mapping[str, tuple[float, int]], capacity: int) -> Limiter:
        """All buckets full.

        Args:
            limits: ``(per_second, burst_count)`` by name: ``per_server``, ``per_server_in_room``,
                ``per_sender``, ``per_room``, ``per_user``. One that is not there is no limit.
                per_second is from 0.001 to 1,000,000, burst_count from 1 to 1,000,000.
            capacity: how many buckets that are not full are kept apart.
        """

    def admit_transaction(
        self, origin: str, pdus: Iterable[tuple[str | None, str | None]], now_ms: int
    ) -> tuple[str, int] | None:
        """Charges all of the sticky PDUs of a transaction, or none (L2).

        Each is charged to the origin; with a room ID to the origin in that room; with a sender too
        to that sender there. One with more PDUs than fit a bucket passes once that is full.

        Args:
            pdus: ``(room_id, sender)`` each, as far as they can be believed.

        Returns:
            ``None`` if admitted, else the name of the limit that it takes longest for and the ms
            until it would pass, at least 1.
        """

    def admit_user(self, user_id: str, now_ms: int) -> tuple[str, int] | None:
        """Charges an event of a local user (E1). Returns as ``admit_transaction`` does."""

    def __len__(self) -> int:
        """How many keys have a bucket of their own at the moment."""

@final
class ReleaseQueue:
    """Events that wait, in the order of their release (L4, D7).

    Rooms take turns, the servers of a room take turns, and of a server's events in a room the one
    that expires first goes first. Whoever a limit holds up does not hold up anybody else.
    """

    def __new__(cls) -> ReleaseQueue: ...
    def admit(
        self, limiter: Limiter, room_id: str, server: str, sender: str, now_ms: int
    ) -> str | None:
        """May a new event be delivered now, and is then charged? It may not overtake what waits
        for the same allowance.

        Returns:
            ``None`` if so, else the name of the limit in its way; it is not added.
        """

    def add(
        self, event_id: str, room_id: str, server: str, sender: str, expires_at_ms: int
    ) -> bool:
        """Has the event wait; ``False`` if it does already."""

    def remove(self, event_id: str) -> bool:
        """Takes the event out; ``False`` if it did not wait."""

    def take(self, limiter: Limiter, now_ms: int, max_events: int) -> list[str]:
        """Takes out the events that are released now, at most so many, charges them, and gives
        their IDs in the order of release."""

    def expire(self, now_ms: int, max_events: int) -> list[str]:
        """Takes out the events that have expired, at most so many, and gives their IDs."""

    def next_due_ms(self, now_ms: int) -> int | None:
        """When there may be something to take or to expire, ``now_ms`` at the earliest; ``None``
        if nothing waits."""

    def waiting(self, server: str) -> int:
        """How many events of the server wait."""

    def __len__(self) -> int: ...
    def __contains__(self, event_id: str, /) -> bool: ...
