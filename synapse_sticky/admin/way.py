"""The way of one event: step by step, and in one sentence (E3).

Pure: it says what the facts say. Where nothing was recorded, it says that.
"""

from collections.abc import Iterator
from typing import Any

import attr

from synapse_sticky.admin.facts import Facts, PersistedEvent
from synapse_sticky.admin.receivers import lacking, shown
from synapse_sticky.orders import HELD

NOT_RECORDED = "not recorded"

DONE, WAITING, FAILED = "done", "waiting", "failed"
NONE = "none"
"""A step that the event did not come to, or did not need."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Step:
    """One step of the way.

    state: ``done``, ``waiting``, ``failed``, ``none`` or ``not recorded``.
    text: what happened, for people.
    at_ms: when; None if that is not known.
    details: what else is known, by name.
    """

    name: str
    state: str
    text: str
    at_ms: int | None = None
    details: dict[str, Any] = attr.Factory(dict)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Verdict:
    """Where the event is, in a word for programs; why, and what to do, for people."""

    code: str
    text: str
    to_do: str


def way(facts: Facts) -> list[Step]:
    """The steps, always the same ones and in the same order."""
    return list(_steps(facts))


def _steps(facts: Facts) -> Iterator[Step]:
    yield _received(facts)
    yield _staged(facts)
    yield _parked(facts)
    yield _persisted(facts)
    yield _checked(facts.event)
    yield _limited(facts)
    yield _delivered(facts)
    yield _pushed(facts)
    yield _ended(facts)


def _received(facts: Facts) -> Step:
    event, waiting = facts.event, facts.staged or facts.parked
    if event is not None and event.server == facts.own_server:
        text = "A user of this server sent it"
        return Step("received", DONE, text, event.received_ms, {"from": event.sender})
    if waiting is not None:
        text = f"{waiting.origin} sent it"
        return Step("received", DONE, text, waiting.received_ms, {"from": waiting.origin})
    if event is None:
        return Step("received", NOT_RECORDED, "This server does not have it")
    return Step(
        "received",
        DONE if event.received_ms is not None else NOT_RECORDED,
        f"It is of {event.server}. Which server sent it here was not recorded",
        event.received_ms,
        {"from": NOT_RECORDED, "server": event.server},
    )


def _staged(facts: Facts) -> Step:
    if facts.staged is not None:
        text = "It was acknowledged, and waits in the staging area to be processed"
        return Step("staged", WAITING, text, facts.staged.received_ms)
    if facts.event is not None and facts.event.server == facts.own_server:
        return Step("staged", NONE, "Only what other servers send is staged")
    return Step("staged", NOT_RECORDED, "It is not staged. Whether it was is not recorded")


def _parked(facts: Facts) -> Step:
    parked = facts.parked
    if "parking" in facts.unread:
        return Step("parked", NOT_RECORDED, "The table of parked PDUs is not there")
    if parked is None:
        if facts.event is not None and facts.event.server == facts.own_server:
            return Step("parked", NONE, "Only what other servers send is parked")
        return Step("parked", NOT_RECORDED, "It is not parked. Whether it was is not recorded")
    why = parked.why or NOT_RECORDED
    details = {"why": why, "next_try_ms": parked.due_ms, "until_ms": parked.until_ms}
    if not facts.is_on_its_way:
        text = f"It was parked: {why}. It has been persisted since"
        return Step("parked", DONE, text, parked.received_ms, details)
    text = f"It was acknowledged and cannot be persisted: {why}. It is tried again until it expires"
    return Step("parked", WAITING, text, parked.received_ms, details)


def _persisted(facts: Facts) -> Step:
    event = facts.event
    if event is None:
        return Step("persisted", NONE, "It is not in the database")
    details = {"room_id": event.room_id, "sender": event.sender, "type": event.type}
    return Step("persisted", DONE, "It is in the database", event.received_ms, details)


def _checked(event: PersistedEvent | None) -> Step:
    if event is None:
        return Step("checked", NONE, "It is not in the database")
    problems: dict[str, Any] = {}
    if event.is_redacted:
        problems["redacted_by"] = list(event.redacted_by)
    if event.rejected is not None:
        problems["rejected"] = event.rejected
    if event.is_outlier:
        problems["outlier"] = True
    if event.is_soft_failed:
        problems["soft_failed"] = True
    if event.refused_by is not None:
        problems["refused_by"] = event.refused_by
    if event.is_erased:
        problems["erased"] = True
    if problems:
        text = f"It is not delivered as sticky: {', '.join(problems)}"
        return Step("checked", FAILED, text.replace("_", " "), None, problems)
    return Step("checked", DONE, "It is allowed, and not redacted")


def _limited(facts: Facts) -> Step:
    deferred = facts.deferred
    if facts.event is not None and facts.event.server == facts.own_server:
        text = "This server's users are limited as they send; it is past that"
        return Step("limited", NONE, text, None, {"limit": NOT_RECORDED})
    if deferred is None:
        return _not_deferred(facts)
    if facts.held_until_ms is not None:
        details: dict[str, Any] = {"limit": deferred.limit or NOT_RECORDED}
        details |= {"held_until_ms": facts.held_until_ms, "about_ms": NOT_RECORDED}
        text = f"An administrator has {deferred.server} held"
        return Step("limited", WAITING, text, deferred.deferred_ms, details)
    about_ms = deferred.about_ms
    details = {
        "limit": deferred.limit or NOT_RECORDED,
        "about_ms": NOT_RECORDED if about_ms is None else about_ms,
    }
    text = f"It is past {limit_of(deferred.limit)}"
    if about_ms is not None and about_ms >= deferred.expires_at_ms:
        details["expires_first"] = True
        text += ", and may expire before its turn"
    return Step("limited", WAITING, text, deferred.deferred_ms, details)


def _not_deferred(facts: Facts) -> Step:
    if "deferral" in facts.unread:
        return Step("limited", NOT_RECORDED, "The table of deferred events is not there")
    if facts.discarded is not None:
        admin, at_ms = facts.discarded
        details = {"discarded_by": admin, "limit": NOT_RECORDED}
        text = "An administrator has discarded what waited there"
        return Step("limited", FAILED, text, at_ms, details)
    if facts.event is not None and facts.event.stream_id is not None and facts.event.is_late:
        text = "Later events were delivered before it: it was deferred, or soft-failed once"
        return Step("limited", DONE, text, None, {"limit": NOT_RECORDED})
    text = "It is not deferred. What it was charged to is not recorded"
    return Step("limited", NOT_RECORDED, text)


def limit_of(name: str | None) -> str:
    """What is said of a limit."""
    if name is None:
        return "a limit that was not recorded"
    return "the order to hold its server" if name == HELD else f"federation.{name}"


def _delivered(facts: Facts) -> Step:
    event = facts.event
    if event is None or facts.deferred is not None:
        return Step("delivered", NONE, "It is not in the stream of sticky events")
    if event.stream_id is None:
        return Step(
            "delivered", NOT_RECORDED, "It is not in the stream of sticky events (any more)"
        )
    details = {"stream_id": event.stream_id}
    if event.is_soft_failed or event.is_redacted or event.is_erased:
        text = "It has a row in the stream of sticky events, and clients are not given it"
        return Step("delivered", FAILED, text, None, details)
    text = "It is in the stream of sticky events: joined users get it in their next sync"
    if event.ends_ms is not None and facts.now_ms >= event.ends_ms:
        text = "It was in the stream of sticky events: joined users got it until it expired"
    return Step("delivered", DONE, text, None, details)


def _pushed(facts: Facts) -> Step:
    event = facts.event
    if event is None or event.server != facts.own_server:
        return Step("pushed", NONE, "Each server pushes its own users' events")
    counts: dict[str, int] = {}
    for _, state in shown(facts):
        counts[state] = counts.get(state, 0) + 1
    state = DONE
    if lacking(facts):
        is_over = event.ends_ms is not None and facts.now_ms >= event.ends_ms
        state = FAILED if is_over else WAITING
    text = f"{facts.receivers_count} other servers are in the room"
    return Step("pushed", state, text, None, {"servers": counts})


def _ended(facts: Facts) -> Step:
    ends_ms = facts.event.ends_ms if facts.event else None
    if ends_ms is None and facts.parked is not None:
        ends_ms = facts.parked.until_ms
    if ends_ms is None:
        return Step("expired", NOT_RECORDED if facts.event is None else NONE, "It has no end")
    if facts.now_ms < ends_ms:
        return Step("expired", NONE, "It has not expired", ends_ms)
    return Step("expired", DONE, "It is not sticky any more", ends_ms)
