"""A push: which own sticky events of one room a newcomer lacks, and when each is sent.

Pure bookkeeping: nothing here waits or asks, and time is an argument. Not only newcomers have
pushes: any other entry of Synapse's backlog gets a push, too.
"""

from collections.abc import Iterable, Mapping

import attr

from synapse_sticky.backoff import Backoff

PATIENT_ATTEMPTS = 3
"""An event that failed more often than this does not count for the window any more."""

GRACE_MS = 2_000
"""How long an event that was sent after the join is left to Synapse's ordinary queue."""

WATCH_AFTER_RECORD_MS = 10_000
"""How long a push still watches after Synapse has recorded how far its ordinary queue got with the
newcomer. After a restart the ordinary queue goes on from there. So the push need only watch for
events that were under way when the newcomer joined."""

MOST_SUSPICIONS = 3
"""How often an event is resent because the newcomer could not be reached."""

CONFIRM_PATIENCE_MS = 30_000
"""How long the newcomer may lack an event that it acknowledged, until it is resent."""


@attr.s(auto_attribs=True, slots=True)
class Sent:
    """An own sticky event that the newcomer is not yet known to have. The push sent it, or left it
    to the ordinary queue first."""

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
    is_suspect: bool = False
    """Could the newcomer not be reached since it acknowledged the event?"""
    suspicions: int = 0
    """How often the event was resent for that."""


class Push:
    """What a destination lacks of a room.

    backlog_position: what Synapse's backlog has for as long as the push lasts. If the module is
        taken out, Synapse starts over from there.
    position: the push is done with all own events before it.
    last_rows: each writer's last row of the room's own events, as stream IDs. The database had
        these rows when it was asked; this process may see them later. Events up to there are due
        at once. While the push is dirty, all events are. Later events are left to Synapse's
        ordinary queue, but the push watches for them until ``watch_until_ms``.
    stored_watch_until_ms: the ``watch_until_ms`` in the table of newcomers. It tells this join from
        an earlier or later one.
    dirty_marks: how often the push became dirty: once by the join, and once more each time that the
        ordinary queue leaves something out.
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
        self.backlog_position = position
        self.position = position
        self.watch_until_ms = watch_until_ms
        self.stored_watch_until_ms = watch_until_ms
        self.last_rows: Mapping[str, int] = {}
        self.dirty_marks = 1
        self.window = 1
        self.delivered_count = 0
        self.is_confirming = False
        self.is_settled = False
        self.is_blocked = False
        """May nothing be sent for now?"""
        self._answered_marks = 0
        """What ``dirty_marks`` was when the handler asked the database."""
        self._asked_after_watch = False
        self._has_acknowledged = False
        self._due_up_to = 0
        """Own events up to this position are not left to the ordinary queue."""
        self._newcomer_pruned = False
        self._highest_delivered = 0
        self._backoff = backoff
        self._sent: dict[str, Sent] = {}
        self._to_send: list[tuple[int, str]] = []
        """``(stream_id, event_id)`` of events that are due and not in ``_sent``."""
        self._finished: dict[str, int] = {}
        """Stream IDs of delivered and skipped events, by event ID."""

    def is_dirty(self, now_ms: int) -> bool:
        """Must the handler ask the database for the last rows? It must after each mark, and once
        more after the watch."""
        watch_is_over = now_ms >= self.watch_until_ms
        return self._answered_marks < self.dirty_marks or (
            watch_is_over and not self._asked_after_watch
        )

    def take_in_last_rows(
        self, last_rows: Mapping[str, int], dirty_marks: int, asked_ms: int
    ) -> None:
        """Takes in what the database answered. It was asked at ``asked_ms``, when the count was
        ``dirty_marks``: the count may have grown since."""
        self.last_rows = last_rows
        self._answered_marks = dirty_marks
        self._asked_after_watch = asked_ms >= self.watch_until_ms
        self._due_up_to = max(self._due_up_to, *last_rows.values(), 0)

    def reopen_from(self, position: int) -> None:
        """The destination lacks events from ``position`` on, too."""
        self.dirty_marks += 1
        self.backlog_position = min(self.backlog_position, position)
        self.position = min(self.position, position)
        self.is_settled = False

    def settle(self) -> None:
        """The destination lacks nothing before ``position``, and that is stored."""
        self.backlog_position = self.position
        self.is_settled = True
        self.delivered_count = 0

    def update(self, own: Iterable[tuple[int, str, str]], now_ms: int, window: int) -> None:
        """Takes in the own unexpired events of the room: ``(stream_id, event_id, sender)``,
        ascending, from ``position`` on. What is no longer among them has expired or is gone."""
        self.window = window
        self._to_send = []
        is_dirty = self.is_dirty(now_ms)
        present = set()
        for stream_id, event_id, _ in own:
            present.add(event_id)
            if stream_id < self.position or event_id in self._finished:
                continue
            sent = self._sent.get(event_id)
            if sent is not None:
                sent.stream_id = stream_id
            elif is_dirty or stream_id <= self._due_up_to:
                self._to_send.append((stream_id, event_id))
            elif now_ms < self.watch_until_ms:
                # After the watch the ordinary queue is relied upon, else a push would never end
                # in a busy room.
                self._sent[event_id] = Sent(stream_id, event_id, now_ms + GRACE_MS)
        self._sent = {e: s for e, s in self._sent.items() if e in present}
        open_positions = [s.stream_id for s in self._sent.values()]
        if self._to_send:
            open_positions.append(self._to_send[0][0])
        if open_positions:
            self.is_settled = False
            self.position = min(open_positions)
        elif self._finished:
            self.position = max(self.position, max(self._finished.values()) + 1)
        self._finished = {e: p for e, p in self._finished.items() if p >= self.position}

    def choose(self, limit: int, now_ms: int) -> list[str]:
        """The event IDs to send now, oldest first; they count as sent from here on."""
        due = [s for s in self._sent.values() if s.acknowledged_ms is None and s.due_ms <= now_ms]
        free = min(limit, self.window - self._in_flight(now_ms))
        candidates = sorted([(s.stream_id, s.event_id) for s in due] + self._to_send)
        chosen = candidates[: max(free, 0)]
        for stream_id, event_id in chosen:
            sent = self._sent.setdefault(event_id, Sent(stream_id, event_id, 0))
            sent.attempts += 1
            sent.due_ms = now_ms + self._backoff.after(sent.attempts)
        chosen_ids = {event_id for _, event_id in chosen}
        self._to_send = [e for e in self._to_send if e[1] not in chosen_ids]
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
        sent = self._sent.get(event_id) or self._move_to_sent(event_id, now_ms)
        if sent is None:
            return False
        # Acknowledged without having been pushed: it went by the ordinary queue.
        sent.attempts = max(sent.attempts, 1)
        sent.acknowledged_ms = now_ms
        return True

    def _move_to_sent(self, event_id: str, now_ms: int) -> Sent | None:
        for event in self._to_send:
            if event[1] == event_id:
                self._to_send.remove(event)
                self._sent[event_id] = Sent(*event, now_ms)
                return self._sent[event_id]
        return None

    def catch_up_recorded(self, now_ms: int) -> None:
        """Synapse recorded how far its ordinary queue got with the destination: the watch ends
        soon. The watch stays as it is if the newcomer has acknowledged no event of the room yet:
        the newcomer may not know of the room."""
        if self._has_acknowledged:
            self.watch_until_ms = min(self.watch_until_ms, now_ms + WATCH_AFTER_RECORD_MS)

    def unconfirmed(self) -> list[Sent]:
        """Acknowledged events that the newcomer is not yet known to have, oldest first."""
        waiting = [s for s in self._sent.values() if s.acknowledged_ms is not None]
        return sorted(waiting, key=lambda s: s.stream_id)

    def mark_delivered(self, event_id: str) -> None:
        """The event is delivered: confirmed, or only acknowledged where ``joins.confirm`` is
        off."""
        sent = self._sent.pop(event_id, None)
        if sent is not None:
            self._finished[event_id] = sent.stream_id
            self._highest_delivered = max(self._highest_delivered, sent.stream_id)
            self.delivered_count += 1

    def skip(self, events: Iterable[tuple[int, str]]) -> None:
        """These events are not to be sent: ``(stream_id, event_id)``."""
        for stream_id, event_id in events:
            self._sent.pop(event_id, None)
            self._finished[event_id] = stream_id
        self._to_send = [e for e in self._to_send if e[1] not in self._finished]

    def is_overtaken(self, sent: Sent) -> bool:
        """Does the newcomer have a later event? It takes what it has staged in order."""
        return sent.stream_id < self._highest_delivered

    def mark_lost(self, sent: Sent, now_ms: int) -> None:
        """The newcomer acknowledged the event, and lacks it: it is resent, later each time."""
        self._newcomer_pruned = True
        sent.acknowledged_ms = None
        sent.overtaken_count = 0
        sent.due_ms = now_ms + self._backoff.after(sent.attempts)

    def suspect_loss(self) -> None:
        """The newcomer cannot be reached, and may have lost what it acknowledged. If it later says
        that it has such an event, it may only have fetched the event (see ``start_over``)."""
        for sent in self._sent.values():
            sent.is_suspect = sent.acknowledged_ms is not None and sent.suspicions < MOST_SUSPICIONS

    def confirm(self, event_id: str, now_ms: int) -> None:
        """The newcomer says that it has the event. It is resent if it may have been lost."""
        sent = self._sent.get(event_id)
        if sent is None or not sent.is_suspect:
            self.mark_delivered(event_id)
            return
        sent.is_suspect = False
        sent.suspicions += 1
        sent.acknowledged_ms = None
        sent.due_ms = now_ms

    def start_over(self) -> bool:
        """Must everything be resent? It must if the newcomer pruned.

        The newcomer may have fetched a pruned event, because another event refers to it. Then it
        answers that it has the event. But it does not take the event for sticky until this server
        sends it in full.
        """
        if not self._newcomer_pruned:
            return False
        self._newcomer_pruned = False
        self._due_up_to = max(self._due_up_to, self._highest_delivered)
        self.position = self.backlog_position
        self._finished = {}
        self._highest_delivered = 0
        return True

    @property
    def is_open(self) -> bool:
        """Is there anything that the newcomer is not yet known to have?"""
        return bool(self._sent or self._to_send)

    def is_idle(self, now_ms: int) -> bool:
        """Is there nothing to do but to watch?"""
        return self.is_settled and not self.is_open and now_ms < self.watch_until_ms

    def worth_sending(self, now_ms: int) -> bool:
        """Do events wait, and is there enough of the window free to make a transaction of?"""
        if self.is_blocked:
            return False
        waits = self._to_send or any(
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
