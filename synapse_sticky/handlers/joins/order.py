"""In which order own events are pushed: those first that show who is in a call now.

An event's key is not known here, only its sender. The newest event of a key comes after all that
it supersedes. So the newest events of each sender come first, and the senders take turns: a user
with many events, such as one that floods, delays nobody else's newest ones.

Only so many come first. Oldest first, most events arrive after their prev_events; an event whose
prev_events the newcomer lacks makes it ask for them, and for the state before it.
"""

from collections.abc import Sequence

OwnEvent = tuple[int, str, str]
"""``(stream_id, event_id, sender)``"""

MOST_OF_SENDER = 20
MOST_FIRST = 100
"""About two seconds of a newcomer's CPU."""


def places_of_first(own: Sequence[OwnEvent]) -> dict[str, int]:
    """The place of each event that is pushed before all others, by event ID (P3).

    Args:
        own: ascending.
    """
    turns: dict[str, int] = {}
    newest: list[tuple[int, int, str]] = []
    for stream_id, event_id, sender in reversed(own):
        turn = turns[sender] = turns.get(sender, 0) + 1
        if turn <= MOST_OF_SENDER:
            newest.append((turn, -stream_id, event_id))
    first = sorted(newest)[:MOST_FIRST]
    return {event_id: place for place, (_, _, event_id) in enumerate(first)}
