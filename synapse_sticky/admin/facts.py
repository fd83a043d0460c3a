"""What is known of one event and of those who should get it, as the database has it (E3).

Every process reads it there, so each answers the same. All times are in ms since the epoch.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

import attr

from synapse_sticky.homeserver import Cursor


@attr.s(auto_attribs=True, frozen=True, slots=True)
class PersistedEvent:
    """An event that Synapse has.

    received_ms: when Synapse persisted it first; None if Synapse did not record that.
    duration_ms: for how long its sender wants it to be sticky; None if it is not sticky.
    ends_ms: until when it is; likewise.
    stream_id: its position in the sticky events stream; None if it has no row there (any more).
    is_late: whether later events of the room entered that stream before it.
    rejected: why Synapse rejected it, if it did.
    refused_by: which of Synapse's checks of content refused it, if any did.
    redacted_by: the redactions of it, valid or not.
    is_censored: whether Synapse has deleted its content for good after the redaction.
    """

    event_id: str
    room_id: str
    sender: str
    type: str
    sent_ms: int
    received_ms: int | None
    stream_ordering: int
    duration_ms: int | None
    ends_ms: int | None
    stream_id: int | None = None
    is_late: bool = False
    rejected: str | None = None
    is_outlier: bool = False
    is_soft_failed: bool = False
    refused_by: str | None = None
    is_redacted: bool = False
    redacted_by: Collection[str] = ()
    is_censored: bool = False
    is_erased: bool = False

    @property
    def server(self) -> str:
        """The sender's server."""
        return self.sender.partition(":")[2]


@attr.s(auto_attribs=True, frozen=True, slots=True)
class StagedPdu:
    """A PDU that was acknowledged and that Synapse has yet to process."""

    origin: str
    room_id: str
    received_ms: int


class Deferred(Protocol):
    """A deferred event."""

    @property
    def room_id(self) -> str: ...
    @property
    def server(self) -> str: ...
    @property
    def limit(self) -> str | None: ...
    @property
    def deferred_ms(self) -> int | None: ...
    @property
    def about_ms(self) -> int | None: ...
    @property
    def expires_at_ms(self) -> int: ...


class Parked(Protocol):
    """A parked PDU."""

    @property
    def origin(self) -> str: ...
    @property
    def room_id(self) -> str: ...
    @property
    def why(self) -> str | None: ...
    @property
    def received_ms(self) -> int: ...
    @property
    def until_ms(self) -> int: ...
    @property
    def due_ms(self) -> int: ...
    @property
    def tries(self) -> int: ...


class Newcomer(Protocol):
    """A newcomer of a room."""

    @property
    def position(self) -> int: ...
    @property
    def joined_ms(self) -> int: ...


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Reachability:
    """What Synapse records of another server.

    failing_since_ms: since when it cannot be reached; None if it can.
    next_try_ms: when Synapse tries again.
    acknowledged_up_to: it has acknowledged what the ordinary queue had up to this position in the
        stream of all events.
    """

    failing_since_ms: int | None = None
    next_try_ms: int | None = None
    acknowledged_up_to: int | None = None


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Receiver:
    """Another server in the room of an own event.

    is_allowed: whether the room's ACL allows it.
    backlog: the position in the sticky events stream from which on it lacks events of the room, by
        Synapse's backlog; None if it is not in there.
    """

    server: str
    is_allowed: bool
    reachability: Reachability
    backlog: int | None = None
    newcomer: Newcomer | None = None


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Facts:
    """All of that of one event.

    held_until_ms: until when an administrator has the server of a deferred event held; None if
        that is not so.
    discarded: who has discarded what waited there, and when, if the event is not in the stream
        although it should be; None if nobody has.
    unread: the duties whose tables are not there, or not yet of a layout that can be read.
    is_own_server_allowed: whether the room's ACL allows this server.
    receivers: a page of those who should get it, if it is of this server.
    receivers_next: the server after which the next page begins; None if there is none.
    """

    event_id: str
    now_ms: int
    own_server: str
    event: PersistedEvent | None = None
    staged: StagedPdu | None = None
    parked: Parked | None = None
    deferred: Deferred | None = None
    held_until_ms: int | None = None
    discarded: tuple[str, int] | None = None
    unread: Collection[str] = ()
    is_own_server_allowed: bool = True
    receivers: Collection[Receiver] = ()
    receivers_count: int = 0
    receivers_next: str | None = None

    @property
    def is_on_its_way(self) -> bool:
        """Was it acknowledged, and not persisted in full yet?"""
        is_here = self.event is not None and not self.event.is_outlier
        return not is_here and (self.staged is not None or self.parked is not None)

    @property
    def is_here(self) -> bool:
        """Does this server have it, or has it acknowledged it?"""
        return self.event is not None or self.is_on_its_way


class Table(Protocol):
    """A duty's table that can be read once it has the layout."""

    @property
    def duty(self) -> str: ...
    @property
    def layout(self) -> int: ...


class DeferredTable(Table, Protocol):
    """The deferred events."""

    def of_event_txn(self, txn: Cursor, event_id: str, /) -> Deferred | None: ...
    def of_server_txn(self, txn: Cursor, server: str, /) -> int: ...


class ParkedTable(Table, Protocol):
    """The parked PDUs."""

    def of_event_txn(self, txn: Cursor, event_id: str, /) -> Parked | None: ...


class NewcomerTable(Table, Protocol):
    """The newcomers."""

    def of_room_txn(
        self, txn: Cursor, room_id: str, destinations: Collection[str], /
    ) -> Mapping[str, Newcomer]: ...


class Holds(Table, Protocol):
    """What administrators have ordered."""

    def held_until_txn(self, txn: Cursor, server: str, /) -> int | None: ...
    def spared_txn(self, txn: Cursor, /) -> tuple[Collection[str], Collection[str]]: ...
    def discarded_txn(
        self, txn: Cursor, room_id: str, sender: str, since_ms: int, /
    ) -> tuple[str, int] | None: ...


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Tables:
    """The duties' tables."""

    deferred: DeferredTable
    parked: ParkedTable
    newcomers: NewcomerTable
    holds: Holds
