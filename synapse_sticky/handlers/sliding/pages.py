"""What a token of sliding sync stands for beside its position, and how that is written down."""

import json
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

import attr

from synapse_sticky.index import Position


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Shown:
    """Up to where the client has been shown the rooms of its user, and whom its user ignores.

    rooms: a position of the events stream: joins up to there are known.
    whole: one of the stream of rooms whose partial state has become whole.
    ignoring: one of the account data stream.
    """

    rooms: Position
    whole: int
    ignoring: int = 0


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Unshown:
    """What a token does not stand for yet: its older events are still to be given.

    room_ids: rooms that the user has joined since.
    senders: users whom the user has stopped ignoring since.
    """

    room_ids: frozenset[str] = frozenset()
    senders: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.room_ids or self.senders)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Older:
    """Older events of some rooms that are still to be read: ``after`` exclusive, ``up_to``
    inclusive."""

    room_ids: frozenset[str]
    after: Position
    up_to: Position

    def only(self, room_ids: AbstractSet[str]) -> "Older":
        return attr.evolve(self, room_ids=self.room_ids & room_ids)

    def is_read(self) -> bool:
        """Is there nothing left to read?"""
        return not self.room_ids or self.up_to.is_before_or_at(self.after)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Page:
    """What is stored of a response.

    older: what it had no room for.
    shown: the rooms and users that it took into account; None if an earlier version of the module
        stored it.
    until: whatever token is past this, of this device, was given out later: it stands for no fewer
        rooms. Of the tokens up to there only those of pages do.
    """

    older: tuple[Older, ...]
    shown: Shown | None = None
    until: Position | None = None


def is_past(position: Position, until: Position | None) -> bool:
    """Is the position further than ``until`` for a writer, and behind it for none?"""
    return until is None or (
        until.is_before_or_at(position) and not position.is_before_or_at(until)
    )


def shown_by(since: Position, pages: Iterable[Page]) -> Shown | None:
    """What the client had been shown when it got the token ``since``, which is of no page; None if
    that is not known.

    pages: those of its device, the latest first.
    """
    for page in pages:
        if page.shown is not None and page.until is not None and is_past(since, page.until):
            return page.shown
    return None


def token_of_page(
    position: Position, writers: Sequence[str], previous: Position | None
) -> Position:
    """A position that says the same of every writer, and that ``position_of_page`` recognises.

    It differs from ``previous``, the token that was asked with.
    """
    named = {writer: position.of(writer) for writer in {*writers, *position.writers}}
    below = position.stream_id - 1
    if previous is not None and 0 < previous.stream_id <= below:
        below = previous.stream_id - 1
    return Position(below, named)


def position_of_page(token: Position, writers: Sequence[str]) -> Position | None:
    """What the token of a page stands for; None if it is no such token."""
    # A client can hand anything in, also positions below nothing.
    if not all(w in token.writers and token.writers[w] > token.stream_id for w in writers):
        return None
    stream_id = min(token.writers[writer] for writer in writers)
    return Position(stream_id, {w: at for w, at in token.writers.items() if at > stream_id})


def dumped(position: Position) -> str:
    """For ``loaded``; the same for the same position."""
    return json.dumps([position.stream_id, sorted(position.writers.items())])


def loaded(text: str) -> Position:
    """What was ``dumped``."""
    stream_id, writers = json.loads(text)
    return Position(stream_id, dict(writers))


def dumped_older(older: Iterable[Older]) -> str:
    """For ``loaded_older``."""
    return json.dumps([[sorted(p.room_ids), dumped(p.after), dumped(p.up_to)] for p in older])


def loaded_older(text: str) -> tuple[Older, ...]:
    """What was dumped."""
    return tuple(
        Older(frozenset(room_ids), loaded(after), loaded(up_to))
        for room_ids, after, up_to in json.loads(text)
    )


def dumped_shown(shown: Shown) -> str:
    """For ``loaded_shown``."""
    return json.dumps([dumped(shown.rooms), shown.whole, shown.ignoring])


def loaded_shown(text: str) -> Shown:
    """What was dumped."""
    rooms, *others = json.loads(text)
    return Shown(loaded(rooms), *others)
