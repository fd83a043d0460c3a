"""The API for administrators: what it says of an event, by what is known of it (E3)."""

from typing import Any

import attr
import pytest
from synapse.module_api.errors import ConfigError, SynapseError

from synapse_sticky.admin.actions import Actions
from synapse_sticky.admin.asking import Absence
from synapse_sticky.admin.facts import Facts, PersistedEvent, Reachability, Receiver, StagedPdu
from synapse_sticky.admin.installing import make_api
from synapse_sticky.admin.receivers import shown
from synapse_sticky.admin.requests import Request, identifier
from synapse_sticky.admin.tables import ActionTable
from synapse_sticky.admin.throttle import Throttle
from synapse_sticky.admin.verdicts import reasons, verdict
from synapse_sticky.admin.way import way
from synapse_sticky.config import parse
from synapse_sticky.handlers.deferral.reading import DeferredEvent, DeferredReader
from synapse_sticky.handlers.joins.reading import NewcomerReader, NewcomerState
from synapse_sticky.handlers.staging.parking.reading import ParkedEvent, ParkedReader
from synapse_sticky.homeserver.rooms import Rooms
from synapse_sticky.lately import Lately
from tests.lab.admin_api import description
from tests.unit.members import ThisProcess

NOW_MS, HOUR_MS = 10_000_000, 3_600_000
ROOM, SENDER = "!room:there", "@eve:there"

EVENT = PersistedEvent(
    *("$event", ROOM, SENDER, "m.call", NOW_MS - 1_000, NOW_MS - 900, 50),
    duration_ms=HOUR_MS,
    ends_ms=NOW_MS + HOUR_MS - 1_000,
    stream_id=7,
)
OWN = attr.evolve(EVENT, sender="@alice:here")
DEFERRED = DeferredEvent(
    *("$event", ROOM, SENDER, "there", NOW_MS + HOUR_MS, "per_sender", NOW_MS - 500, NOW_MS + 500)
)
PARKED = ParkedEvent("there", ROOM, "its prev_events cannot be fetched", 5, NOW_MS + 9, 6, 0)


def facts(event: PersistedEvent | None = EVENT, **others: Any) -> Facts:
    return Facts("$event", NOW_MS, "here", event, **others)


def states(of: Facts) -> dict[str, str]:
    return {step.name: step.state for step in way(of)}


@pytest.mark.requirement("E3")
@pytest.mark.parametrize(
    ("known", "code"),
    [
        (facts(), "delivered"),
        (facts(deferred=DEFERRED), "deferred"),
        (facts(attr.evolve(EVENT, stream_id=None), deferred=DEFERRED), "deferred"),
        (facts(attr.evolve(EVENT, stream_id=None)), "not_recorded"),
        (facts(attr.evolve(EVENT, stream_id=None), unread=["deferral"]), "not_recorded"),
        (facts(deferred=DEFERRED, held_until_ms=NOW_MS + 1), "held"),
        (facts(attr.evolve(EVENT, stream_id=None), discarded=("@admin:here", 5)), "discarded"),
        (
            facts(attr.evolve(EVENT, stream_id=None, ends_ms=5), discarded=("@admin:here", 5)),
            "expired",
        ),
        (facts(None, parked=PARKED), "parked"),
        (facts(attr.evolve(EVENT, is_outlier=True), parked=PARKED), "parked"),
        (facts(None, staged=StagedPdu("there", ROOM, 5)), "staged"),
        (facts(attr.evolve(EVENT, is_outlier=True)), "outlier"),
        (facts(attr.evolve(EVENT, is_soft_failed=True)), "soft_failed"),
        (facts(attr.evolve(EVENT, is_soft_failed=True, is_redacted=True)), "redacted"),
        (facts(attr.evolve(EVENT, is_censored=True, duration_ms=None)), "redacted"),
        (facts(attr.evolve(EVENT, is_redacted=True), deferred=DEFERRED), "redacted"),
        (facts(attr.evolve(EVENT, is_erased=True)), "erased"),
        (facts(attr.evolve(EVENT, rejected="auth_error")), "rejected"),
        (facts(attr.evolve(EVENT, refused_by="policy server", is_soft_failed=True)), "refused"),
        (facts(attr.evolve(EVENT, duration_ms=None, ends_ms=None)), "not_sticky"),
        (facts(attr.evolve(EVENT, ends_ms=NOW_MS)), "expired"),
        (facts(attr.evolve(EVENT, ends_ms=NOW_MS, is_soft_failed=True)), "soft_failed"),
    ],
)
def test_each_case_has_its_word(known: Facts, code: str) -> None:
    assert verdict(known).code == code
    assert len(way(known)) == 9


@pytest.mark.requirement("E3")
def test_what_was_never_recorded_is_not_made_up() -> None:
    assert states(facts()) == {
        "received": "done",
        "staged": "not recorded",
        "parked": "not recorded",
        "persisted": "done",
        "checked": "done",
        "limited": "not recorded",
        "delivered": "done",
        "pushed": "none",
        "expired": "none",
    }
    received, *_ = way(facts())
    assert received.details == {"from": "not recorded", "server": "there"}
    old = attr.evolve(DEFERRED, limit=None, deferred_ms=None, about_ms=None)
    limited = next(step for step in way(facts(deferred=old)) if step.name == "limited")
    assert limited.details == {"limit": "not recorded", "about_ms": "not recorded"}
    assert "not recorded" in verdict(facts(deferred=old)).text
    unread = facts(unread=("parking", "deferral", "joins"))
    assert states(unread)["parked"] == states(unread)["limited"] == "not recorded"
    gone = facts(attr.evolve(EVENT, ends_ms=NOW_MS, stream_id=None))
    assert "not recorded" in verdict(gone).text


@pytest.mark.requirement("E3")
def test_one_that_was_delivered_late_was_held_up_by_something() -> None:
    late = facts(attr.evolve(EVENT, is_late=True))
    limited = next(step for step in way(late) if step.name == "limited")
    assert (limited.state, limited.details) == ("done", {"limit": "not recorded"})


@pytest.mark.requirement("E3")
def test_one_that_expires_before_its_turn_is_told() -> None:
    slow = attr.evolve(DEFERRED, about_ms=DEFERRED.expires_at_ms)
    limited = next(step for step in way(facts(deferred=slow)) if step.name == "limited")
    assert limited.details["expires_first"] is True


@pytest.mark.requirement("E3", "P7")
@pytest.mark.parametrize(
    ("receiver", "state", "code"),
    [
        ({"newcomer": NewcomerState("there", ROOM, 8, 5)}, "confirmed", "delivered"),
        ({"newcomer": NewcomerState("there", ROOM, 7, 5)}, "waiting", "being_pushed"),
        ({"backlog": 7}, "waiting", "being_pushed"),
        ({"backlog": 8}, "not recorded", "delivered"),
        ({"backlog": 7, "reachability": Reachability(5, 6)}, "unreachable", "unreachable"),
        ({"reachability": Reachability(5, 6)}, "unreachable", "unreachable"),
        ({"reachability": Reachability(acknowledged_up_to=50)}, "acknowledged", "delivered"),
        ({"reachability": Reachability(acknowledged_up_to=49)}, "not recorded", "delivered"),
        ({"is_allowed": False, "backlog": 7}, "denied by ACL", "denied_by_acl"),
    ],
)
def test_how_far_a_receiver_is(receiver: dict[str, Any], state: str, code: str) -> None:
    one = Receiver(
        **{"server": "there", "is_allowed": True, "reachability": Reachability(), **receiver}
    )
    known = facts(OWN, receivers=[one], receivers_count=1)
    assert [found for _, found in shown(known)] == [state]
    assert verdict(known).code == code


@pytest.mark.requirement("E3", "P7")
def test_a_page_of_receivers_does_not_stand_for_all() -> None:
    one = Receiver("there", True, Reachability(acknowledged_up_to=50))
    known = facts(OWN, receivers=[one], receivers_count=2)
    assert "Of 1 of 2 other servers" in verdict(known).text
    assert "pages" in verdict(known).to_do
    assert "pages" not in verdict(attr.evolve(known, receivers_count=1)).to_do


@pytest.mark.requirement("E3")
def test_an_acl_that_denies_this_server_concerns_all() -> None:
    one = Receiver("there", True, Reachability(acknowledged_up_to=50))
    known = facts(OWN, receivers=[one], receivers_count=1, is_own_server_allowed=False)
    assert [found for _, found in shown(known)] == ["denies this server by ACL"]
    assert verdict(known).code == "denied_by_acl"


@pytest.mark.requirement("E3")
@pytest.mark.parametrize(
    ("absence", "codes"),
    [
        (Absence(None, None), ["say_more", "not_received"]),
        (Absence(ROOM, "there"), ["not_received"]),
        (Absence(ROOM, "there", is_known=False), ["not_in_room", "not_received"]),
        (Absence(ROOM, "there", is_joined=False), ["not_in_room", "not_received"]),
        (Absence(ROOM, "there", is_allowed=False), ["denied_by_acl", "not_received"]),
        (Absence(ROOM, "there", has_member=False), ["sender_not_in_room", "not_received"]),
        (Absence(ROOM, "there", too_many_deferred=10), ["refused", "not_received"]),
        (Absence(ROOM, "there", reachability=Reachability(5)), ["unreachable", "not_received"]),
        (Absence(ROOM, "here"), ["refused_locally", "not_received"]),
    ],
)
def test_why_an_event_may_not_be_here(absence: Absence, codes: list[str]) -> None:
    found = list(reasons(absence, facts(None)))
    assert [reason.code for reason in found] == codes
    assert all(reason.text and reason.to_do for reason in found)


@pytest.mark.requirement("E3", "H3")
def test_requests_are_checked() -> None:
    request = Request("GET", ["overview"], {"limit": ["5"], "twice": ["1", "1"]}, {}, "@admin:here")
    assert request.limit() == 5
    assert request.choice("order", ["up", "down"], "up") == "up"
    assert request.integer("other", 7, 0, 9) == 7
    for ask in (
        lambda: request.only("limit"),
        lambda: request.text("twice"),
        lambda: request.integer("limit", 1, 6, 9),
        lambda: request.choice("limit", ["up"], "up"),
    ):
        with pytest.raises(SynapseError) as raised:
            ask()
        assert raised.value.code == 400
    for hostile in ("", "a\0b", "a\nb", "\u202e", "\ud800", "ü" * 128, None, 5, ["$a"]):
        with pytest.raises(SynapseError):
            identifier("event_id", hostile)
    assert identifier("event_id", "ü" * 127) == "ü" * 127


@pytest.mark.requirement("E3", "H3")
def test_nobody_can_ask_without_end() -> None:
    now_ms = 0
    throttle = Throttle(lambda: now_ms)
    for _ in range(200):
        throttle.admin("@admin:here")
    with pytest.raises(SynapseError) as raised:
        throttle.admin("@admin:here")
    assert raised.value.code == 429
    throttle.admin("@other:here")
    throttle.address("127.0.0.1")
    now_ms = 60
    throttle.admin("@admin:here")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "_synapse/sticky",
        "/_synapse/sticky/",
        "/_synapse/admin",
        "/_matrix/client/x",
        "/_synapse/client/sticky",
        "/a b",
        "/a/../b",
        "/health",
        5,
        None,
    ],
)
def test_a_path_that_cannot_be(path: object) -> None:
    with pytest.raises(ConfigError, match=r"admin\.path must be a path"):
        parse({"admin": {"path": path}})


def test_a_path_that_can() -> None:
    assert parse({"admin": {"path": "/_synapse/administrators/sticky"}}).admin.enabled


@pytest.mark.requirement("E3")
def test_all_that_is_there_is_described(process: ThisProcess) -> None:
    config = parse({})
    readers = DeferredReader(process, config.federation), ParkedReader(), NewcomerReader(process)
    rooms, table = Rooms(process), ActionTable(process)
    actions = Actions(process, rooms, table, config.federation, lambda: None)
    lately = Lately(process.now_ms)
    api = make_api(process, config, rooms, *readers, actions, table, lately)
    there = {(route.method.lower(), f"/{route.path}") for route in api.routes}
    paths = description()["paths"]
    assert there == {(method, path) for path, methods in paths.items() for method in methods}
