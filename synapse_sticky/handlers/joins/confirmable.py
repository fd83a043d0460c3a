"""What a newcomer takes, refuses, and is found to have or to have lost."""

from collections.abc import Collection, Iterable

from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.joins.finished import Finished
from synapse_sticky.handlers.joins.sent import MOST_SENDS, FirstContact, Sent


class Confirmable:
    """The part of a push that follows what the newcomer answers.

    delivered_count: how many events it was found to have, or believed to have.
    expired_count: how many events were sent and expired, or were redacted, unacknowledged.
    named: the delivered events that the newcomer said to have some copy of, by ID. They are still
        to be told from outliers.
    """

    def __init__(self, backoff: Backoff) -> None:
        self.delivered_count = self.expired_count = 0
        self.is_settled = False
        self.named: dict[str, None] = {}
        self._backoff = backoff
        self._contact = FirstContact(backoff)
        self._sent: dict[str, Sent] = {}
        """What was sent, or named in an answer, and is open."""
        self._unsent: dict[str, Sent] = {}
        """The first of the other open events: they are due, or left to the ordinary queue."""
        self._finished = Finished()
        """The events that were delivered, skipped or given up, from the push's position on."""
        self._highest_delivered = 0
        self._has_lost = False

    def acknowledge(self, event_id: str, now_ms: int) -> bool:
        """The newcomer acknowledged the event; is it one that this push cares about?"""
        if self._contact.make():  # what was sent before is due at once
            for waiting in self._sent.values():
                waiting.revive(now_ms)
        sent = self._sent.get(event_id) or self._move_to_sent(event_id, now_ms)
        if sent is None:
            return False
        self.is_settled = False
        sent.acknowledge(now_ms)
        return True

    def refuse(self, event_ids: Collection[str], now_ms: int) -> int:
        """The newcomer answered with an error for these. That may pass, so they are resent until
        they expire: after the longest delay, or once it takes something again. Until then it is
        sent one event at a time. Gives how many it refuses, if it took something before."""
        found = [self._sent.get(e) or self._move_to_sent(e, now_ms) for e in set(event_ids)]
        until_ms = now_ms + self._backoff.max_ms
        count = sum(sent is not None and sent.refuse(until_ms) for sent in found)
        if count:
            self.is_settled = False
        return count if count and self._contact.lose(now_ms) else 0

    @property
    def is_refused(self) -> bool:
        """Is there anything that the newcomer refused when it was sent last?"""
        return any(sent.is_refused for sent in self._sent.values())

    def try_now(self, now_ms: int, *, is_sent: bool = True) -> None:
        """What was sent in vain is due: the cause may be over. If the newcomer has acknowledged
        nothing since, it gets one event at first.

        Args:
            is_sent: also what it has not answered to, and not only what it refused.
        """
        for sent in self._sent.values():
            if sent.is_refused or (is_sent and sent.attempts):
                sent.due_ms = now_ms
        if self._contact.is_awaited:
            self._contact.expect()

    def _move_to_sent(self, event_id: str, now_ms: int) -> Sent | None:
        if (sent := self._unsent.pop(event_id, None)) is not None:
            sent.due_ms = sent.due_ms or now_ms
            self._sent[event_id] = sent
        return sent

    def unconfirmed(self) -> list[Sent]:
        """Acknowledged events that the newcomer is not yet known to have, oldest first."""
        waiting = [s for s in self._sent.values() if s.acknowledged_ms is not None]
        return sorted(waiting, key=lambda s: s.stream_id)

    def mark_delivered(self, event_id: str) -> None:
        """The event is delivered: the newcomer has it, or its acknowledgement suffices."""
        sent = self._sent.pop(event_id, None)
        if sent is not None:
            self._finished.add(sent.stream_id)
            self._highest_delivered = max(self._highest_delivered, sent.stream_id)
            self.delivered_count += 1

    def mark_present(self, event_ids: Iterable[str], now_ms: int, *, is_named: bool = False) -> int:
        """The newcomer has these events, or their acknowledgements suffice. Gives how many of them
        were open. An event that may have been lost is resent: the newcomer may only have fetched
        its copy.

        Args:
            is_named: the newcomer says that it has some copy of them.
        """
        found = [sent for e in event_ids if (sent := self._sent.get(e))]
        taken = [sent.acknowledged_ms for sent in found if sent.acknowledged_ms is not None]
        for sent in found:
            if sent.is_suspect:
                self._resend(sent, now_ms)
            else:
                self.mark_delivered(sent.event_id)
                if is_named and sent.sends < MOST_SENDS:
                    self.named[sent.event_id] = None
        for sent in self._sent.values():
            if taken and sent.acknowledged_ms is not None and min(taken) <= sent.acknowledged_ms:
                sent.patient_from_ms = now_ms
        return len(found)

    def mark_lost(self, events: Iterable[Sent], now_ms: int) -> int:
        """The newcomer acknowledged the events, and has lost them. They are resent. Those that have
        been sent often enough count as delivered; gives how many these are."""
        given_up = 0
        for sent in list(events):
            if sent.sends >= MOST_SENDS:
                self.mark_delivered(sent.event_id)
                given_up += 1
            else:
                self._has_lost = True
                self._resend(sent, now_ms)
        return given_up

    def suspect_loss(self) -> None:
        """The newcomer cannot be reached, and may have lost what it acknowledged. If it later says
        that it has such an event, it may only have fetched the event (see ``restart_if_lost``)."""
        for sent in self._sent.values():
            sent.is_suspect = sent.acknowledged_ms is not None and sent.sends < MOST_SENDS

    def _resend(self, sent: Sent, now_ms: int) -> None:
        sent.is_suspect = False
        sent.acknowledged_ms = None
        sent.due_ms = now_ms
