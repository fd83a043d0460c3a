"""The Rust core: what is sticky and until when, and an index of the sticky events there are.

No clock, no I/O: time is always an argument, in integer milliseconds since the Unix epoch, and
named ``_ms``. Every function raises ``TypeError`` for an argument of the wrong type (a ``bool`` is
not an ``int``) and ``ValueError`` for one that cannot be used, naming it, and has then changed
nothing. An ``int`` has at most 64 bits unless said otherwise.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Final, final

__all__ = ["MAX_STICKY_DURATION_MS", "StickyIndex", "sticky_duration_ms", "sticky_until_ms"]

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
