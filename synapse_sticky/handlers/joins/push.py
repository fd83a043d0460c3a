"""A push: which own sticky events one newcomer to one room lacks, and when each is sent.

Pure bookkeeping: nothing here waits or asks, and time is an argument. Newcomers are not the only
ones: what else Synapse's backlog has for a destination is pushed in the same way.
"""

from collections.abc import Iterable, Mapping

import attr

from synapse_sticky.backoff import Backoff

PATIENT_ATTEMPTS = 3
"""An event that failed more often than this does not count for the window any more."""

GRACE_MS = 2_000
"""How long an event that was sent after the join is left to Synapse's ordinary queue."""

WATCH_AFTER_RECORD_MS = 10_000
"""How long a push watches on once Synapse has recorded up to where its ordinary queue got to the
newcomer: Synapse goes on from there after a restart. What is left are events that were under way
when the newcomer joined."""

MOST_SUSPICIONS = 3
"""How often an event is resent because the newcomer could not be reached."""

CONFIRM_PATIENCE_MS = 30_000
"""How long the newcomer may lack an event that it acknowledged, until it is resent."""


@attr.s(auto_attribs=True, slots=True)
class Sent:
    """An own sticky event that the newcomer is not yet known to have."""

    stream_id: int
    event_id: str
    due_ms: int
    """When it is sent, or resent, unless it is acknowledged by then."""
    attempts: int = 0
    acknowledged_ms: int | None = None
    overtaken_count: int = 0
    """How often the newcomer had a later event and lacked this one."""
    refusal_count: int = 0
    """How often the newcomer refused to say whether it has the event."""
    suspect: bool = False
    """Could the newcomer not be reached since it acknowledged the event?"""
    suspicions: int = 0
    """How often the event was resent for that."""


class Push:
    """What a destination lacks of a room.

    base: what Synapse's backlog says for as long as the push lasts, so that Synapse starts over
        from there if the module is taken out.
    position: the push is done with all own events before it.
    last_rows: the last rows of the room's own events that the database had when it was asked, as
        stream IDs by writer; this process may see them later. What was there by then is due at
        once, and so is everything while the push is dirty. What was sent since is left to Synapse's
        ordinary queue, but watched for until ``watch_until_ms``.
    recorded_watch_until_ms: what the database says of that, which tells this join from an earlier
        or later one.
    dirty_marks: counts what the database has to be asked for: the join, and each time that the
        ordinary queue left something out since.
    """

    def __init__(
        self,
        destination: str,
        room_id: str,
        *,
        position: int,
        watch_until_ms: int,
        backoff: Backoff,
    ) -> None:
        self.destination = destination
        self.room_id = room_id
        self.base = position
        self.position = position
        self.watch_until_ms = watch_until_ms
        self.recorded_watch_until_ms = watch_until_ms
        self.last_rows: Mapping[str, int] = {}
        self.dirty_marks = 1
        self.window = 1
        self.delivered = 0
        self.confirming = False
        self.settled = False
        self.is_blocked = False
        """May nothing be sent for now?"""
        self._refreshed_marks = 0
        """What ``dirty_marks`` was when the database was asked."""
        self._refreshed_after_watch = False
        self._has_acknowledged = False
        self._due_up_to = 0
        """Own events up to this position are not left to the ordinary queue."""
        self._pruned = False
        self._highest_done = 0
        self._backoff = backoff
        self._sent: dict[str, Sent] = {}
        self._fresh: list[tuple[int, str]] = []
        self._done: dict[str, int] = {}

    def is_dirty(self, now_ms: int) -> bool:
        """Has the database to be asked for the last rows? After each mark, and once more after the
        watch."""
        watch_is_over = now_ms >= self.watch_until_ms
        return self._refreshed_marks < self.dirty_marks or (
            watch_is_over and not self._refreshed_after_watch
        )

    def refresh(self, last_rows: Mapping[str, int], dirty_marks: int, asked_ms: int) -> None:
        """Takes in what the database said at ``asked_ms``; ``dirty_marks`` is the count of then, as
        it may have grown since."""
        self.last_rows = last_rows
        self._refreshed_marks = dirty_marks
        self._refreshed_after_watch = asked_ms >= self.watch_until_ms
        self._due_up_to = max(self._due_up_to, *last_rows.values(), 0)

    def lower(self, position: int) -> None:
        """The destination lacks events from ``position`` on, too."""
        self.dirty_marks += 1
        self.base = min(self.base, position)
        self.position = min(self.position, position)
        self.settled = False

    def settle(self) -> None:
        """The destination lacks nothing before ``position``, and that is stored."""
        self.base = self.position
        self.settled = True
        self.delivered = 0

    def update(self, own: Iterable[tuple[int, str, str]], now_ms: int, window: int) -> None:
        """Takes in the own unexpired events of the room: ``(stream_id, event_id, sender)``,
        ascending, from ``position`` on. What is no longer among them has expired or is gone."""
        self.window = window
        self._fresh = []
        is_dirty = self.is_dirty(now_ms)
        present = set()
        for stream_id, event_id, _ in own:
            present.add(event_id)
            if stream_id < self.position or event_id in self._done:
                continue
            sent = self._sent.get(event_id)
            if sent is not None:
                sent.stream_id = stream_id
            elif is_dirty or stream_id <= self._due_up_to:
                self._fresh.append((stream_id, event_id))
            elif now_ms < self.watch_until_ms:
                # After the watch the ordinary queue is relied upon, else a push would never end
                # in a busy room.
                self._sent[event_id] = Sent(stream_id, event_id, now_ms + GRACE_MS)
        self._sent = {e: s for e, s in self._sent.items() if e in present}
        open_positions = [s.stream_id for s in self._sent.values()]
        if self._fresh:
            open_positions.append(self._fresh[0][0])
        if open_positions:
            self.settled = False
            self.position = min(open_positions)
        elif self._done:
            self.position = max(self.position, max(self._done.values()) + 1)
        self._done = {e: p for e, p in self._done.items() if p >= self.position}

    def choose(self, limit: int, now_ms: int) -> list[str]:
        """The event IDs to send now, oldest first; they count as sent from here on."""
        due = [s for s in self._sent.values() if s.acknowledged_ms is None and s.due_ms <= now_ms]
        room = min(limit, self.window - self._in_flight(now_ms))
        candidates = sorted([(s.stream_id, s.event_id) for s in due] + self._fresh)
        chosen = candidates[: max(room, 0)]
        for stream_id, event_id in chosen:
            sent = self._sent.setdefault(event_id, Sent(stream_id, event_id, 0))
            sent.attempts += 1
            sent.due_ms = now_ms + self._backoff.after(sent.attempts)
        chosen_ids = {event_id for _, event_id in chosen}
        self._fresh = [f for f in self._fresh if f[1] not in chosen_ids]
        return [event_id for _, event_id in chosen]

    def _in_flight(self, now_ms: int) -> int:
        """Events that may be in the newcomer's staging area, as far as that can be known."""
        return sum(
            0 < s.attempts <= PATIENT_ATTEMPTS
            and (s.acknowledged_ms is not None or s.due_ms > now_ms)
            for s in self._sent.values()
        )

    def acknowledge(self, event_id: str, now_ms: int) -> bool:
        """The newcomer acknowledged the event; is it one that this push cares about?"""
        self._has_acknowledged = True
        sent = self._sent.get(event_id) or self._take_fresh(event_id, now_ms)
        if sent is None:
            return False
        # Acknowledged without having been pushed: it went by the ordinary queue.
        sent.attempts = max(sent.attempts, 1)
        sent.acknowledged_ms = now_ms
        return True

    def _take_fresh(self, event_id: str, now_ms: int) -> Sent | None:
        for fresh in self._fresh:
            if fresh[1] == event_id:
                self._fresh.remove(fresh)
                self._sent[event_id] = Sent(*fresh, now_ms)
                return self._sent[event_id]
        return None

    def catch_up_recorded(self, now_ms: int) -> None:
        """Synapse recorded up to where its ordinary queue got to the destination. The watch ends
        soon then; not before the newcomer acknowledged an event of the room, as it may not know of
        the room until then."""
        if self._has_acknowledged:
            self.watch_until_ms = min(self.watch_until_ms, now_ms + WATCH_AFTER_RECORD_MS)

    def unconfirmed(self) -> list[Sent]:
        """Acknowledged events that the newcomer is not yet known to have, oldest first."""
        waiting = [s for s in self._sent.values() if s.acknowledged_ms is not None]
        return sorted(waiting, key=lambda s: s.stream_id)

    def done(self, event_id: str) -> None:
        """The newcomer has the event, or is not to get it."""
        sent = self._sent.pop(event_id, None)
        if sent is not None:
            self._done[event_id] = sent.stream_id
            self._highest_done = max(self._highest_done, sent.stream_id)
            self.delivered += 1

    def skip(self, events: Iterable[tuple[int, str]]) -> None:
        """These events are not to be sent: ``(stream_id, event_id)``."""
        for stream_id, event_id in events:
            self._sent.pop(event_id, None)
            self._done[event_id] = stream_id
        self._fresh = [f for f in self._fresh if f[1] not in self._done]

    def overtaken(self, sent: Sent) -> bool:
        """Does the newcomer have a later event? It takes what it has staged in order."""
        return sent.stream_id < self._highest_done

    def lost(self, sent: Sent, now_ms: int) -> None:
        """The newcomer acknowledged the event, and lacks it: it is resent, later each time."""
        self._pruned = True
        sent.acknowledged_ms = None
        sent.overtaken_count = 0
        sent.due_ms = now_ms + self._backoff.after(sent.attempts)

    def suspect_loss(self) -> None:
        """The newcomer cannot be reached, and may have lost what it acknowledged. That it has such
        an event says little then: it may have fetched it (see ``start_over``)."""
        for sent in self._sent.values():
            sent.suspect = sent.acknowledged_ms is not None and sent.suspicions < MOST_SUSPICIONS

    def confirm(self, event_id: str, now_ms: int) -> None:
        """The newcomer says that it has the event. It is resent if it may have been lost."""
        sent = self._sent.get(event_id)
        if sent is None or not sent.suspect:
            self.done(event_id)
            return
        sent.suspect = False
        sent.suspicions += 1
        sent.acknowledged_ms = None
        sent.due_ms = now_ms

    def start_over(self) -> bool:
        """Has everything to be resent? It has if the newcomer pruned.

        The newcomer may have fetched pruned events meanwhile, as what somebody's event refers to.
        It answers that it has such an event, but does not take it for sticky until it is sent in
        full.
        """
        if not self._pruned:
            return False
        self._pruned = False
        self._due_up_to = max(self._due_up_to, self._highest_done)
        self.position = self.base
        self._done = {}
        self._highest_done = 0
        return True

    @property
    def open(self) -> bool:
        """Is there anything that the newcomer is not yet known to have?"""
        return bool(self._sent or self._fresh)

    def idle(self, now_ms: int) -> bool:
        """Is there nothing to do but to watch?"""
        return self.settled and not self.open and now_ms < self.watch_until_ms

    def worth_sending(self, now_ms: int) -> bool:
        """Do events wait, and is there enough of the window free to make a transaction of?"""
        if self.is_blocked:
            return False
        waits = self._fresh or any(
            s.acknowledged_ms is None and s.due_ms <= now_ms for s in self._sent.values()
        )
        return bool(waits) and self._in_flight(now_ms) <= self.window // 2

    def next_due_ms(self, now_ms: int) -> int | None:
        """When there is something to send next, None if nothing waits for a time."""
        if self.is_blocked:
            return None
        if self.worth_sending(now_ms):
            return now_ms
        return min(
            (
                s.due_ms
                for s in self._sent.values()
                if s.acknowledged_ms is None and s.due_ms > now_ms
            ),
            default=None,
        )
