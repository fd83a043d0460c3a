"""Why PDUs are parked: the words of the log, of administrators and of the table, and the name that
the metrics have for it.
"""

import enum
from collections import Counter
from collections.abc import Iterable, Mapping


class Reason(enum.Enum):
    """Why a PDU could not be persisted. The words of one that begins like another come first."""

    PREV_EVENTS = "its prev_events cannot be fetched"
    AUTH_EVENTS = "its auth_events cannot be fetched"
    DATABASE = "it cannot be persisted for now"
    UNKNOWN = "it cannot be persisted"
    STATE = "the room's state has become whole meanwhile"
    JOINING = "the room is being joined"
    NOT_JOINED = "this server is not in the room yet"

    def __str__(self) -> str:
        return self.value


LONGEST = max(len(str(reason)) for reason in Reason)
"""By so many characters of its words each reason is known."""


def name_of(why: str | None) -> str:
    """The name of a reason, one of ``metrics.REASONS``.

    Args:
        why: its words, and perhaps more behind them; None of a PDU that an earlier version of the
            module parked.
    """
    found = (reason for reason in Reason if why and why.startswith(str(reason)))
    return next(found, Reason.UNKNOWN).name.lower()


def counts_by_name(counts: Iterable[tuple[str | None, int]]) -> Mapping[str, int]:
    """How many PDUs each reason has, by its name: gets how many there are of some words each."""
    found: Counter[str] = Counter()
    for why, count in counts:
        found[name_of(why)] += count
    return found
