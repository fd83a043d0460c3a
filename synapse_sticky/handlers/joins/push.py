"""A push: which own sticky events of one room a newcomer lacks, and when each is sent.

Pure bookkeeping: nothing here waits or asks, and time is an argument. Not only newcomers have
pushes: any other entry of Synapse's backlog gets a push, too.
"""

from collections.abc import Callable, Collection, Iterable, Mapping

from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.joins.confirmable import Confirmable
from synapse_sticky.handlers.joins.confirmation.asking import Asked
from synapse_sticky.handlers.joins.finished import Finished
from synapse_sticky.handlers.joins.order import OwnEvent
from synapse_sticky.handlers.joins.sent import GRACE_MS, MOST_SENDS, Sent

WATCH_AFTER_RECORD_MS = 10_000
"""How long a push still watches after Synapse has recorded how far its ordinary queue got with the
newcomer. After a restart the ordinary queue goes on from there. So the push need only watch for
events that were under way when the newcomer joined."""

_MOST_REMEMBERED = 1_000
NO_END = 2**63


class Push(Confirmable):
    """What a destination lacks of a room.

    backlog_position: what Synapse's backlog has for as long as the push lasts. If the module is
        taken out, Synapse starts over from there.
    position: the push is done with all own events before it.
    last_rows: each writer's last row of the room's own events, as stream IDs, when the database was
        asked; this process may see them later. Events up to there are due at once; while the push
        is dirty, all are. Later events are left to Synapse's ordinary queue, but the push watches
        for them until ``watch_until_ms``.
    stored_watch_until_ms: the ``watch_until_ms`` in the table of newcomers. It tells this join from
        an earlier or later one.
    first: which events are pushed before all others, and their places, by event ID.
    dirty_marks: how often the push became dirty: once by the join, and once more each time that the
        ordinary queue leaves something out.
    is_blocked: whether nothing may be sent for now: this server is not in the room, or the room's
        ACL denies one of the two. It ends with a change of the room's state, and takes no attempts.
    is_believed: whether its acknowledgements suffice: too many newcomers are watched.
    is_back: whether it is to be asked if it still has what it got when it was in the room before.
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
        super().__init__(backoff)
        self.destination = destination
        self.room_id = room_id
        self.backlog_position = position
        self.position = position
        self.watch_until_ms = watch_until_ms
        self.stored_watch_until_ms = watch_until_ms
        self.last_rows: Mapping[str, int] = {}
        self.first: Mapping[str, int] = {}
        self.dirty_marks = 1
        self.window = 1
        self.is_blocked = self.is_believed = self.is_back = False
        self.asked = Asked()
        self._answered_marks = 0
        """What ``dirty_marks`` was when the handler asked the database."""
        self._asked_after_watch = False
        self._due_up_to = 0
        """Own events up to this position are not left to the ordinary queue."""
        self._start = position
        """Where sending everything again begins."""
        self._last_own = self._last_seen = self._again_up_to = 0
        self._sent_often: dict[int, None] = {}
        """The stream IDs of events that are not resent any more, whatever the newcomer answers."""

    def continue_from(self, position: int, before: "Push | None", not_before_ms: int) -> None:
        """The newcomer was in the room before, and has all own events before ``position``, and what
        the push ``before`` is done with. Nothing is sent until ``not_before_ms`` (since the epoch).
        """
        self.position = self._start = max(self.position, position)
        self._contact.not_before_ms = not_before_ms
        if before is not None:
            self._finished = before.finished.after(position)

    @property
    def finished(self) -> Finished:
        """What it is done with, from ``position`` on."""
        return self._finished

    @property
    def sent(self) -> Collection[Sent]:
        """What was sent, or named in an answer, and is open."""
        return self._sent.values()

    def restart_in_full(self) -> None:
        """The newcomer lost what it had from before: all is sent again."""
        self.position = self._start = self.backlog_position
        self._finished = Finished()
        self.is_settled = False

    def note_outlier(self) -> None:
        """It has only fetched an event: all is sent once more (see ``restart_if_lost``)."""
        self._start, self._has_lost = self.backlog_position, True

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

    def refused(self, stream_id: int, event_id: str) -> None:
        """The newcomer refused this own event, which the push need not know: the ordinary queue may
        have sent it. Then it is due with all that follows."""
        is_known = event_id in self._sent or event_id in self._unsent
        if not is_known and stream_id >= self.position and stream_id not in self._finished:
            self.reopen_from(stream_id)

    def settle(self) -> None:
        """The destination lacks nothing before ``position``, and that is stored."""
        self.backlog_position = self._start = self.position
        self.is_settled = True
        self.delivered_count = self.expired_count = 0

    def update(
        self,
        own: Iterable[OwnEvent],
        now_ms: int,
        window: int,
        *,
        seen_ms: Callable[[int], int] | None = None,
        is_cut: bool = False,
        whole_up_to: int = NO_END,
    ) -> int:
        """Takes in the own unexpired events of the room, ascending, from ``position`` on. What is
        no longer among them has expired or is gone. Gives how many of those were sent in vain.

        Args:
            own: may leave out what is finished.
            seen_ms: when this process first saw the event of a stream ID; by default, now.
            is_cut: whether there are later events, none of them sent.
            whole_up_to: ``own`` leaves out nothing else up to this stream ID, and no event up to
                there will come later.
        """
        self.window = window
        before, self._unsent = self._unsent, {}
        present, open_ids, last_id = set(), [], 0
        for stream_id, event_id, _ in own:
            present.add(event_id)
            last_id = stream_id
            if stream_id < self.position or stream_id in self._finished:
                continue
            open_ids.append(stream_id)
            if (sent := self._sent.get(event_id)) is not None:
                sent.stream_id = stream_id
            elif (left := before.get(event_id)) is not None and left.due_ms:
                self._expect(stream_id, event_id, now_ms, left.due_ms)
            else:
                since_ms = now_ms if seen_ms is None else seen_ms(stream_id)
                self._expect(stream_id, event_id, now_ms, since_ms + GRACE_MS)
        self._last_own = NO_END if is_cut else max(self._last_seen, last_id)
        self._last_seen = max(self._last_seen, last_id)
        gone = [s for e, s in self._sent.items() if e not in present]
        in_vain = sum(sent.acknowledged_ms is None for sent in gone)
        self._sent = {e: s for e, s in self._sent.items() if e in present}
        self.expired_count += in_vain
        self._finished.join(open_ids, whole_up_to)
        if self.is_open:
            self.is_settled = False
            self.position = min(s.stream_id for s in (*self._sent.values(), *self._unsent.values()))
        elif self._finished and not is_cut:
            self.position = max(self.position, min(self._finished.last, whole_up_to) + 1)
        self._finished = self._finished.after(self.position)
        return in_vain

    def _expect(self, stream_id: int, event_id: str, now_ms: int, left_until_ms: int) -> None:
        """The event is open if it is due, or if the push watches for it."""
        if self.is_dirty(now_ms) or stream_id <= self._due_up_to:
            self._unsent[event_id] = Sent(stream_id, event_id, 0)
        elif now_ms < self.watch_until_ms:
            # After the watch the ordinary queue is relied upon, else a push would never end
            # in a busy room.
            self._unsent[event_id] = Sent(stream_id, event_id, left_until_ms)

    def take_in_named(self, stream_id: int, event_id: str, now_ms: int) -> None:
        """An answer names this own event: it may be later than all that ``update`` took in."""
        is_known = event_id in self._sent or event_id in self._unsent
        if not is_known and stream_id >= self.position and stream_id not in self._finished:
            self._expect(stream_id, event_id, now_ms, now_ms + GRACE_MS)

    def next_events(self, limit: int, now_ms: int) -> dict[str, int]:
        """What can be sent now, at most ``limit`` events, oldest first: stream IDs by event ID. If
        not all can be sent now, it is those that are ``first``, then the oldest. ``send`` sends it.

        A newcomer that is still joining answers /send, but acknowledges nothing. Until its first
        acknowledgement, each attempt sends one event, and not the same one as the last attempt.
        """
        if not self._may_send(now_ms):
            return {}
        due = [s for s in self._unsent.values() if s.due_ms <= now_ms]
        candidates = [*self._due(now_ms), *due]
        candidates.sort(key=lambda s: (self.first.get(s.event_id, NO_END), s.stream_id))
        free = max(min(limit, self.window - self._in_flight(now_ms)), 0)
        if not self._contact.is_made:
            candidates.sort(key=lambda s: (s.attempts, s.stream_id))
            free = min(free, 1)
        chosen = sorted(candidates[:free], key=lambda s: s.stream_id)
        return {sent.event_id: sent.stream_id for sent in chosen}

    def send(self, event_ids: Iterable[str], now_ms: int) -> list[str]:
        """These events of ``next_events`` are sent now. Gives those that count as sent from here
        on: not what has been acknowledged, or has expired, since they were chosen."""
        found = [self._unsent.get(e) or self._sent.get(e) for e in event_ids]
        chosen = [s for s in found if s is not None and s.acknowledged_ms is None]
        if not self._may_send(now_ms):
            return []
        if chosen:
            self._contact.try_again(now_ms)
        for sent in chosen:
            if self._unsent.pop(sent.event_id, None) is not None:
                self._sent[sent.event_id] = sent
                # What is resent after a loss counts as sent once.
                sent.attempts = int(sent.stream_id <= self._again_up_to)
            sent.send(now_ms, self._backoff)
            if sent.sends >= MOST_SENDS:
                self._sent_often[sent.stream_id] = None
        while len(self._sent_often) > _MOST_REMEMBERED:
            del self._sent_often[next(iter(self._sent_often))]
        return [sent.event_id for sent in chosen]

    def count_resent(self, event_ids: Iterable[str]) -> int:
        """How many of these, which were just chosen, had been sent before."""
        return sum(self._sent[event_id].attempts > 1 for event_id in event_ids)

    def _due(self, now_ms: int) -> list[Sent]:
        is_awaited = self._contact.is_awaited
        waiting = [s for s in self._sent.values() if s.acknowledged_ms is None]
        # While the newcomer takes nothing, whatever was sent in vain may be early.
        return [s for s in waiting if s.due_ms <= now_ms or (is_awaited and s.attempts)]

    def _may_send(self, now_ms: int) -> bool:
        return now_ms >= self._contact.may_send_ms and not self.is_blocked

    def _in_flight(self, now_ms: int) -> int:
        """Events that may be in the newcomer's staging area, as far as that can be known."""
        return sum(s.is_in_flight(now_ms, self._contact.is_made) for s in self._sent.values())

    def clock_set(self, by_ms: int) -> None:
        """The clock was set by so much. All due times move along. The end of the watch stays, as
        it is stored."""
        self._contact.clock_set(by_ms)
        for sent in (*self._sent.values(), *self._unsent.values()):
            sent.clock_set(by_ms)

    def catch_up_recorded(self, now_ms: int) -> None:
        """Synapse recorded how far its ordinary queue got with the destination: the watch ends
        soon. The watch stays as it is if the newcomer has acknowledged no event of the room yet:
        the newcomer may not know of the room."""
        if self._contact.is_made:
            self.watch_until_ms = min(self.watch_until_ms, now_ms + WATCH_AFTER_RECORD_MS)

    def is_last(self, sent: Sent) -> bool:
        """Is it the last own event of the room?"""
        return sent.stream_id >= self._last_own

    def skip(self, events: Iterable[tuple[int, str]]) -> None:
        """These events are not to be sent: ``(stream_id, event_id)``."""
        for stream_id, event_id in events:
            self._sent.pop(event_id, None)
            self._unsent.pop(event_id, None)
            self._finished.add(stream_id)

    def restart_if_lost(self) -> bool:
        """If the newcomer has lost something, everything that was sent once is due again. Gives
        whether that is so.

        The newcomer may have fetched what it pruned, because another event refers to it. Then it
        has the event, but does not take it for sticky until this server sends it in full.
        """
        if not self._has_lost:
            return False
        self._has_lost = False
        self._again_up_to = max(self._again_up_to, self._highest_delivered)
        self._due_up_to = max(self._due_up_to, self._again_up_to)
        self.position = self._start
        open_ids = {s.stream_id for s in self._sent.values() if s.acknowledged_ms is None}
        often = sorted(self._sent_often.keys() - open_ids)
        self._finished = Finished((at, at) for at in often)
        self._highest_delivered = 0
        return True

    @property
    def is_open(self) -> bool:
        """Is there anything that the newcomer is not yet known to have?"""
        return bool(self._sent or self._unsent)

    @property
    def awaits_contact(self) -> bool:
        """Was something sent in vain, and nothing acknowledged yet?"""
        return self._contact.is_awaited

    def is_idle(self, now_ms: int) -> bool:
        """Is there nothing to do but to watch?"""
        return self.is_settled and not self.is_open and now_ms < self.watch_until_ms

    def worth_sending(self, now_ms: int) -> bool:
        """Do events wait, and is there enough of the window free to make a transaction of?"""
        is_free = self.missing_for_half(now_ms) == 0
        return is_free and self.has_waiting(now_ms) and self._may_send(now_ms)

    def has_waiting(self, now_ms: int) -> bool:
        """Do events wait to be sent?"""
        is_due = any(s.due_ms <= now_ms for s in self._unsent.values())
        return is_due or bool(self._due(now_ms))

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
        waiting += [s.due_ms for s in self._unsent.values()]
        return min((due_ms for due_ms in waiting if due_ms > now_ms), default=None)
