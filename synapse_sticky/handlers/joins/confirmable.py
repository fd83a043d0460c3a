"""What a newcomer is found to have, or to have lost, of what it acknowledged."""

from collections.abc import Iterable

from synapse_sticky.handlers.joins.finished import Finished
from synapse_sticky.handlers.joins.sent import MOST_SENDS, Sent


class Confirmable:
    """The part of a push that follows what the newcomer is found to have.

    delivered_count: how many events it was found to have, or believed to have.
    """

    def __init__(self) -> None:
        self.delivered_count = 0
        self._sent: dict[str, Sent] = {}
        """What was sent, or named in an answer, and is open."""
        self._finished = Finished()
        """The events that were delivered, skipped or given up, from the push's position on."""
        self._highest_delivered = 0
        self._has_lost = False

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

    def mark_present(self, event_ids: Iterable[str], now_ms: int) -> int:
        """The newcomer says that it has some copy of these events, or their acknowledgements
        suffice. Gives how many of them were open. An event that may have been lost is resent: the
        newcomer may only have fetched its copy."""
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

    def mark_lost(self, events: Iterable[Sent], now_ms: int) -> None:
        """The newcomer acknowledged the events, and has lost them. They are resent. Those that have
        been sent often enough count as delivered."""
        for sent in list(events):
            if sent.attempts >= MOST_SENDS:
                self.mark_delivered(sent.event_id)
            else:
                self._has_lost = True
                self._resend(sent, now_ms)

    def suspect_loss(self) -> None:
        """The newcomer cannot be reached, and may have lost what it acknowledged. If it later says
        that it has such an event, it may only have fetched the event (see ``restart_if_lost``)."""
        for sent in self._sent.values():
            sent.is_suspect = sent.acknowledged_ms is not None and sent.attempts < MOST_SENDS

    def _resend(self, sent: Sent, now_ms: int) -> None:
        sent.is_suspect = False
        sent.acknowledged_ms = None
        sent.due_ms = now_ms
