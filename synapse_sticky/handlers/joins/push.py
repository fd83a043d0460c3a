"""A push: which own sticky events of one room a newcomer lacks, and when each is sent.

Pure bookkeeping: nothing here waits or asks, and time is an argument. Not only newcomers have
pushes: any other entry of Synapse's backlog gets a push, too.
"""

from collections.abc import Collection, Iterable, Mapping

from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.joins.confirmation.asking import Asked
from synapse_sticky.handlers.joins.sent import GRACE_MS, MOST_SENDS, FirstContact, Sent

WATCH_AFTER_RECORD_MS = 10_000
"""How long a push still watches after Synapse has recorded how far its ordinary queue got with the
newcomer. After a restart the ordinary queue goes on from there. So the push need only watch for
events that were under way when the newcomer joined."""

_MOST_REMEMBERED = 5_000


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
    is_blocked: whether nothing may be sent for now.
    probe: an event that the newcomer had when it was in the room before. It is asked for once.
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
        self.is_settled = self.is_blocked = False
        self.probe: str | None = None
        self.asked = Asked()
        self._answered_marks = 0
        """What ``dirty_marks`` was when the handler asked the database."""
        self._asked_after_watch = False
        self._contact = FirstContact(backoff)
        self._due_up_to = 0
        """Own events up to this position are not left to the ordinary queue."""
        self._start = position
        """Where sending everything again begins."""
        self._last_own = self._again_up_to = 0
        self._has_lost = False
        self._highest_delivered = 0
        self._backoff = backoff
        self._sent: dict[str, Sent] = {}
        self._to_send: list[tuple[int, str]] = []
        """``(stream_id, event_id)`` of events that are due and not in ``_sent``."""
        self._finished: dict[str, int] = {}
        """Stream IDs of events that were delivered, skipped or given up, by event ID."""
        self._sent_often: dict[str, int] = {}
        """The same of events that no answer has sent again."""

    def follow(self, position: int, before: "Push | None", not_before_ms: int) -> None:
        """The newcomer was in the room before. Up to ``position`` it has all own events, and after
        it what ``before`` knows, if that push still was there. Nothing is sent until
        ``not_before_ms`` (ms since the epoch)."""
        self.position = self._start = max(self.position, position)
        self._contact.floor_ms = not_before_ms
        self._finished = before.finished_after(position) if before is not None else {}

    def finished_after(self, position: int) -> dict[str, int]:
        """Stream IDs of events that are done with, from the position on, by event ID."""
        return {e: p for e, p in self._finished.items() if p >= position}

    def start_anew(self) -> None:
        """The newcomer lacks what it had when it was in the room before."""
        self.position = self._start = self.backlog_position
        self._finished = {}
        self.is_settled = False

    def is_dirty(self, now_ms: int) -> bool:
        """Must the handler ask the database for the last rows? It must after each mark, and once
        more after the watch."""
        is_due_again = now_ms >= self.watch_until_ms and not self._asked_after_watch
        return is_due_again or self._answered_marks < self.dirty_marks

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
        self.position, self._start = min(self.position, position), min(self._start, position)
        self.is_settled = False

    def settle(self) -> None:
        """The destination lacks nothing before ``position``, and that is stored."""
        self.backlog_position = self._start = self.position
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
            self._last_own = max(self._last_own, stream_id)
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
        open_positions += [stream_id for stream_id, _ in self._to_send[:1]]
        if open_positions:
            self.is_settled = False
            self.position = min(open_positions)
        elif self._finished:
            self.position = max(self.position, max(self._finished.values()) + 1)
        self._finished = {e: p for e, p in self._finished.items() if p >= self.position}

    def choose(self, limit: int, now_ms: int) -> list[str]:
        """The event IDs to send now, oldest first; they count as sent from here on.

        A newcomer that is still joining answers, and acknowledges nothing. Until it does, each
        attempt is of one event, and of another one each time.
        """
        if not self._may_send(now_ms):
            return []
        candidates = sorted([(s.stream_id, s.event_id) for s in self._due(now_ms)] + self._to_send)
        free = max(min(limit, self.window - self._in_flight(now_ms)), 0)
        if not self._contact.is_made:
            candidates.sort(key=lambda c: (s.attempts if (s := self._sent.get(c[1])) else 0, c[0]))
            free = min(free, 1)
        chosen = candidates[:free]
        if chosen:
            self._contact.try_again(now_ms)
        for stream_id, event_id in chosen:
            before = int(stream_id <= self._again_up_to)
            new = Sent(stream_id, event_id, 0, attempts=before, answers=before)
            sent = self._sent.setdefault(event_id, new)
            sent.send(now_ms, self._backoff)
            if sent.attempts >= MOST_SENDS:
                self._sent_often[event_id] = stream_id
        while len(self._sent_often) > _MOST_REMEMBERED:
            del self._sent_often[next(iter(self._sent_often))]
        sent_now = set(chosen)
        self._to_send = [event for event in self._to_send if event not in sent_now]
        return [event_id for _, event_id in chosen]

    def _due(self, now_ms: int) -> list[Sent]:
        is_awaited = self._contact.is_awaited
        waiting = [s for s in self._sent.values() if s.acknowledged_ms is None]
        return [s for s in waiting if s.due_ms <= now_ms or (is_awaited and s.may_be_early())]

    def _may_send(self, now_ms: int) -> bool:
        return now_ms >= self._contact.may_send_ms and not self.is_blocked

    def _in_flight(self, now_ms: int) -> int:
        """Events that may be in the newcomer's staging area, as far as that can be known."""
        return sum(s.is_in_flight(now_ms, self._contact.is_made) for s in self._sent.values())

    def acknowledge(self, event_id: str, now_ms: int) -> bool:
        """The newcomer acknowledged the event; is it one that this push cares about?"""
        if self._contact.make():  # what was sent before is due at once
            for waiting in self._sent.values():
                waiting.due_ms = now_ms if waiting.attempts else waiting.due_ms
        sent = self._sent.get(event_id) or self._move_to_sent(event_id, now_ms)
        if sent is None:
            return False
        sent.acknowledge(now_ms)
        return True

    def refuse(self, event_ids: Collection[str], now_ms: int) -> int:
        """The newcomer answered with an error for these. They are resent once: after the longest
        delay, or as soon as it first acknowledges something. Gives how many are given up."""
        ids = set(event_ids) & {*self._sent, *(event_id for _, event_id in self._to_send)}
        found = [self._sent.get(e) or self._move_to_sent(e, now_ms) for e in ids]
        until_ms = now_ms + self._backoff.max_ms
        given_up = [(s.stream_id, s.event_id) for s in found if s and s.refuse(until_ms)]
        self.skip(given_up)
        return len(given_up)

    def _move_to_sent(self, event_id: str, now_ms: int) -> Sent | None:
        for event in self._to_send:
            if event[1] == event_id:
                self._to_send.remove(event)
                self._sent[event_id] = Sent(*event, now_ms)
                return self._sent[event_id]
        return None

    def clock_set(self, by_ms: int) -> None:
        """The clock was set by so much: what is due keeps its distance. The watch is stored."""
        self._contact.clock_set(by_ms)
        for sent in self._sent.values():
            sent.clock_set(by_ms)

    def catch_up_recorded(self, now_ms: int) -> None:
        """Synapse recorded how far its ordinary queue got with the destination: the watch ends
        soon. The watch stays as it is if the newcomer has acknowledged no event of the room yet:
        the newcomer may not know of the room."""
        if self._contact.is_made:
            self.watch_until_ms = min(self.watch_until_ms, now_ms + WATCH_AFTER_RECORD_MS)

    def unconfirmed(self) -> list[Sent]:
        """Acknowledged events that the newcomer is not yet known to have, oldest first."""
        waiting = [s for s in self._sent.values() if s.acknowledged_ms is not None]
        return sorted(waiting, key=lambda s: s.stream_id)

    def is_last(self, sent: Sent) -> bool:
        """Is it the last own event of the room?"""
        return sent.stream_id >= self._last_own

    def mark_delivered(self, event_id: str) -> None:
        """The event is delivered: the newcomer has it, or its acknowledgement has to do."""
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

    def has(self, event_ids: Iterable[str], now_ms: int) -> int:
        """The newcomer says that it has some copy of these events. Gives how many it was not yet
        known to have. What may have been lost is resent: the copy may be one that it fetched."""
        found = [sent for e in event_ids if (sent := self._sent.get(e))]
        taken = [sent.acknowledged_ms for sent in found if sent.acknowledged_ms is not None]
        for sent in found:
            if sent.is_suspect:
                self._resend(sent, now_ms)
            else:
                self.mark_delivered(sent.event_id)
        for sent in self._sent.values():
            if taken and sent.acknowledged_ms is not None and min(taken) <= sent.acknowledged_ms:
                sent.patient_from_ms = now_ms
        return len(found)

    def lacks(self, events: Iterable[Sent], now_ms: int) -> None:
        """The newcomer acknowledged the events, and has lost them. They are resent, unless they
        have been sent often enough."""
        for sent in list(events):
            if sent.attempts >= MOST_SENDS:
                self.mark_delivered(sent.event_id)
            else:
                self._has_lost = True
                self._resend(sent, now_ms)

    def suspect_loss(self) -> None:
        """The newcomer cannot be reached, and may have lost what it acknowledged. If it later says
        that it has such an event, it may only have fetched the event (see ``start_over``)."""
        for sent in self._sent.values():
            sent.is_suspect = sent.acknowledged_ms is not None and sent.attempts < MOST_SENDS

    def _resend(self, sent: Sent, now_ms: int) -> None:
        sent.is_suspect = False
        sent.acknowledged_ms = None
        sent.due_ms = now_ms

    def start_over(self) -> bool:
        """Must everything be resent that was sent once? It must if the newcomer lost something.

        The newcomer may have fetched what it pruned, because another event refers to it. Then it
        answers that it has the event. But it does not take the event for sticky until this server
        sends it in full.
        """
        if not self._has_lost:
            return False
        self._has_lost = False
        self._again_up_to = max(self._again_up_to, self._highest_delivered)
        self._due_up_to = max(self._due_up_to, self._again_up_to)
        self.position = self._start
        self._finished = dict(self._sent_often)
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
        is_free = self.missing_for_half(now_ms) == 0
        return is_free and self.has_waiting(now_ms) and self._may_send(now_ms)

    def has_waiting(self, now_ms: int) -> bool:
        """Do events wait to be sent?"""
        return bool(self._to_send or self._due(now_ms))

    def missing_for_half(self, now_ms: int) -> int:
        """How many events the newcomer must take until half of the window is free."""
        return max(self._in_flight(now_ms) - self.window // 2, 0)

    def next_due_ms(self, now_ms: int) -> int | None:
        """When there is something to send next, None if nothing waits for a time."""
        if self.is_blocked:
            return None
        if self.worth_sending(now_ms):
            return now_ms
        if now_ms < (may_ms := self._contact.may_send_ms) and self.has_waiting(may_ms):
            return may_ms
        waiting = [s.due_ms for s in self._sent.values() if s.acknowledged_ms is None]
        return min((due_ms for due_ms in waiting if due_ms > now_ms), default=None)
