"""An event on its way to a newcomer, and how often it may be sent."""

import attr

from synapse_sticky.backoff import Backoff

GRACE_MS = 2_000
"""How long an event that was sent after the join is left to Synapse's ordinary queue."""

PATIENT_ATTEMPTS = 3
"""An event that failed more often than this does not count for the window any more."""

PACE_MS = 1_400
"""Where the acknowledgement suffices, the event counts as staged for this long after it, or for
longer (``Sent.pace_ms``). A plain Synapse takes some 40 events a second, and all servers together
send a window of 48 in this time."""

_PROCESSING_PER_STAGING = 5

MOST_SENDS = 2
"""No answer of the newcomer makes the module send an event more often than this. An answer to /send
that leaves the event out does not count as an answer for it."""

PATIENCE_MS = 30_000
"""How long the newcomer may lack an event that it acknowledged. After that the event counts as
lost. The newcomer may process what it acknowledged in any order, so it proves nothing that it has a
later event. The time begins anew whenever it turns out to have another event that it acknowledged
no later."""


@attr.s(auto_attribs=True, slots=True)
class Sent:
    """An own sticky event that the newcomer is not yet known to have. The push sent it, or left it
    to the ordinary queue first."""

    stream_id: int
    event_id: str
    due_ms: int
    """When it is sent, or resent, unless it is acknowledged by then."""
    attempts: int = 0
    sent_ms: int | None = None
    acknowledged_ms: int | None = None
    patient_from_ms: int = 0
    """When the time began after which the acknowledged event is taken to be lost."""
    is_suspect: bool = False
    """Could the newcomer not be reached since it acknowledged the event?"""
    answers: int = 0
    """How many answers to /send named it, with an error or without."""
    is_refused: bool = False
    """Was there an error for the event when it was sent last?"""

    def send(self, now_ms: int, backoff: Backoff) -> None:
        """It is sent now, and again after the backoff's delay unless it is acknowledged by then."""
        self.attempts += 1
        self.sent_ms = now_ms
        self.due_ms = now_ms + backoff.after(self.attempts)
        self.is_refused = False

    def acknowledge(self, now_ms: int) -> None:
        """The newcomer has staged it, whether it was pushed or went by the ordinary queue."""
        self.attempts = max(self.attempts, 1)
        self.answers += 1
        self.acknowledged_ms = self.patient_from_ms = now_ms
        self.is_refused = False

    def refuse(self, until_ms: int) -> bool:
        """The newcomer refused it, and so has not staged it. It is due again at ``until_ms``, as
        the cause may pass. Has it been sent often enough?"""
        if self.acknowledged_ms is not None:
            return False  # that was another copy
        self.attempts = max(self.attempts, 1)
        self.answers += 1
        self.due_ms, self.is_refused = until_ms, True
        return self.answers >= MOST_SENDS

    def may_be_early(self) -> bool:
        """May it be sent again before it is due, while the newcomer may still be joining?"""
        return self.attempts > 0 and not self.is_refused

    def pace_ms(self) -> int:
        """How long the acknowledged event counts as staged where its acknowledgement suffices.

        A plain Synapse acknowledges a transaction once it has staged its PDUs, and takes about five
        times as long to process them, however fast it is.
        """
        if self.sent_ms is None or self.acknowledged_ms is None:
            return PACE_MS
        staging_ms = self.acknowledged_ms - self.sent_ms
        return min(max(PACE_MS, _PROCESSING_PER_STAGING * staging_ms), PATIENCE_MS)

    def clock_set(self, by_ms: int) -> None:
        """The clock was set by so much: all times keep their distance."""
        self.due_ms = self.due_ms and self.due_ms + by_ms  # 0 is at once
        self.patient_from_ms += by_ms
        self.sent_ms = None if self.sent_ms is None else self.sent_ms + by_ms
        if self.acknowledged_ms is not None:
            self.acknowledged_ms += by_ms

    def is_in_flight(self, now_ms: int, is_known_there: bool) -> bool:
        """May it be in the newcomer's staging area? Nothing is, before the newcomer knows of the
        room."""
        if self.is_refused or not 0 < self.attempts <= PATIENT_ATTEMPTS:
            return False
        return self.acknowledged_ms is not None or (is_known_there and self.due_ms > now_ms)


@attr.s(auto_attribs=True, slots=True)
class FirstContact:
    """The time before a newcomer has acknowledged anything of a room: it may still be joining."""

    backoff: Backoff
    is_made: bool = False
    tries: int = 0
    not_before_ms: int = 0
    """Nothing is sent until then, as the newcomer's last push began a short time ago."""
    retry_at_ms: int = 0
    """Nothing is sent until then, as the last attempt was in vain."""

    @property
    def is_awaited(self) -> bool:
        """Was something sent in vain?"""
        return self.tries > 0 and not self.is_made

    @property
    def may_send_ms(self) -> int:
        """From when on something may be sent."""
        return max(self.not_before_ms, self.retry_at_ms)

    def clock_set(self, by_ms: int) -> None:
        """The clock was set by so much: all times keep their distance."""
        self.not_before_ms += by_ms
        self.retry_at_ms += by_ms

    def try_again(self, now_ms: int) -> None:
        """Something is sent; later each time, until the newcomer acknowledges it."""
        if not self.is_made:
            self.tries += 1
            self.retry_at_ms = now_ms + self.backoff.after(self.tries)

    def make(self) -> bool:
        """The newcomer has acknowledged something. Is it the first time?"""
        is_first = not self.is_made
        self.is_made, self.retry_at_ms = True, 0
        return is_first
