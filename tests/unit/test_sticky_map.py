"""The map that the lab's client keeps, by the rules of MSC4354's addendum."""

from typing import Any

from tests.lab.client import HOUR_MS, TTL
from tests.lab.sticky_map import StickyMap

NOW_MS = 10 * HOUR_MS


def event(event_id: str, sent_ms: int = NOW_MS, duration_ms: int = HOUR_MS, **other: Any) -> Any:
    return {
        "event_id": event_id,
        "type": "m.rtc.member",
        "sender": "@alice:a",
        "origin_server_ts": sent_ms,
        "content": {"msc4354_sticky_key": "device"},
        "msc4354_sticky": {"duration_ms": duration_ms},
        **other,
    }


def shown(*events: Any, redacted: str = "", after_ms: int = 0) -> list[str]:
    """The IDs of those that count after so long."""
    sticky = StickyMap()
    for taken in events:
        sticky.add(taken, NOW_MS)
    sticky.redact(redacted)
    return [current["event_id"] for current in sticky.current(NOW_MS + after_ms)]


def test_of_a_key_the_latest_counts_whatever_came_last() -> None:
    old, new = event("$old", NOW_MS - 1), event("$new")
    assert shown(old, new) == shown(new, old) == ["$new"]
    # By their ends: this one was sent later, and ends earlier.
    assert shown(event("$short", NOW_MS + 1, HOUR_MS - 2), new) == ["$new"]
    # At the same time the greater ID is later.
    assert shown(event("$b"), event("$a")) == shown(event("$a"), event("$b")) == ["$b"]


def test_a_key_is_a_type_a_sender_and_a_sticky_key() -> None:
    others = [
        event("$b", type="m.rtc.slot"),
        event("$c", sender="@bob:b"),
        event("$d", content={"msc4354_sticky_key": "other"}),
    ]
    assert shown(event("$a"), *others) == ["$a", "$b", "$c", "$d"]


def test_without_a_key_each_counts() -> None:
    assert shown(event("$a", content={}), event("$b", content={})) == ["$a", "$b"]


def test_what_expires_leaves() -> None:
    taken = event("$a", NOW_MS - 5, 15)
    assert shown(taken, after_ms=9) == ["$a"]
    assert shown(taken, after_ms=10) == []
    # One that is dated ahead lasts from its receipt on, an hour at most.
    assert shown(event("$a", NOW_MS + 100, 15), after_ms=15) == []
    assert shown(event("$a", duration_ms=2 * HOUR_MS), after_ms=HOUR_MS) == []
    # What the server says of it comes first.
    said = event("$a", unsigned={TTL: 3})
    assert shown(said, after_ms=2) == ["$a"]
    assert shown(said, after_ms=3) == []


def test_what_is_redacted_gives_way_to_the_one_before() -> None:
    assert shown(event("$a", NOW_MS - 1), event("$b"), redacted="$b") == ["$a"]
    gone = event("$a", content={})
    del gone["msc4354_sticky"]
    assert shown(gone) == []
