"""What other servers, clients and operators can hand in never raises what it should not."""

import contextlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synapse.api.errors import SynapseError
from twisted.internet.defer import ensureDeferred

from synapse_sticky._core import (
    MAX_STICKY_DURATION_MS,
    Limiter,
    ReleaseQueue,
    StickyIndex,
    sticky_until_ms,
)
from synapse_sticky.config import FederationConfig, LimitConfig, Mode
from synapse_sticky.handlers.receipt import synapse as receipt
from synapse_sticky.handlers.receipt.handler import ReceiptHandler
from synapse_sticky.handlers.sending import synapse as sending
from synapse_sticky.handlers.sliding.pages import position_of_page
from synapse_sticky.handlers.staging.pdu import StagedPdu, prev_event_ids_of
from synapse_sticky.handlers.staging.pruning.handler import PruningHandler
from synapse_sticky.index import Position
from synapse_sticky.limits import LimitReport, Refusal
from tests.unit.settable import METRICS

FIELD = "msc4354_sticky"
NOW_MS = 1_800_000_000_000
INT64 = range(-(2**63), 2**63)

# Texts with halves of characters, as JSON can have them, and NUL.
texts = st.text(st.characters(), max_size=20) | st.sampled_from(["\ud800", "\0", "!r:s", "@u:s"])
numbers = st.integers() | st.sampled_from([0, 2**53, 2**63, 2**64, -(2**63) - 1, NOW_MS])
scalars = st.none() | st.booleans() | numbers | st.floats() | texts
keys = texts | st.sampled_from(
    ["duration_ms", FIELD, "room_id", "sender", "origin_server_ts", "prev_events", "pdus"]
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
fields = anything | st.fixed_dictionaries({"duration_ms": anything})
pdus = st.fixed_dictionaries(
    {},
    optional={
        FIELD: fields,
        "room_id": anything,
        "sender": anything,
        "origin_server_ts": anything | st.just(NOW_MS),
        "prev_events": anything,
    },
)


def read(content: Any) -> Any:
    """What another server's JSON becomes here."""
    return json.loads(json.dumps(content))


@pytest.mark.requirement("S1")
@given(field=fields, frozen=st.booleans())
def test_field(field: Any, frozen: bool) -> None:
    expected = None
    if isinstance(field, dict):
        asked = field.get("duration_ms")
        if isinstance(asked, int) and not isinstance(asked, bool) and asked >= 0:
            expected = min(asked, MAX_STICKY_DURATION_MS)
        if frozen:
            field = MappingProxyType(field)
    assert sticky_until_ms(field, 0, 0) == expected


@pytest.mark.requirement("S2")
@given(duration_ms=numbers, sent=anything, received_ms=st.integers(INT64[0], INT64[-1]))
def test_end_of_stickiness(duration_ms: int, sent: Any, received_ms: int) -> None:
    until_ms = sticky_until_ms({"duration_ms": duration_ms}, sent, received_ms)
    if duration_ms < 0 or type(sent) is not int:
        assert until_ms is None
        return
    held = min(duration_ms, MAX_STICKY_DURATION_MS)
    exact = min(sent, received_ms) + held
    assert until_ms == min(max(exact, INT64[0] + held), INT64[-1])


class _Homeserver:
    """As much of one as the check of a transaction needs."""

    def now_ms(self) -> int:
        return NOW_MS

    def steady_ms(self) -> int:
        return NOW_MS

    async def transact(self, what: str, function: Any, *args: Any) -> Any:
        return function(None, *args)

    transact_briefly = transact

    async def transact_alone(self, what: str, function: Any) -> None: ...


class _Receipt:
    async def is_answered(self, origin: str, transaction_id: str) -> bool:
        return False

    def tell_staged(self, staged: object) -> None: ...

    def has_more_txn(self, txn: object, origin: str, at_most: int) -> bool:
        return False


class _Deferred:
    duty = "deferral"
    migrations = ()

    def count_txn(self, txn: None, server: str, at_most: int) -> int:
        return 0


@pytest.mark.requirement("L2", "L6")
@given(body=st.fixed_dictionaries({"pdus": st.lists(pdus | anything, max_size=60) | anything}))
def test_transaction(body: Any) -> None:
    body = read(body)
    found = receipt.sticky_pdus(body)
    assert all(FIELD in pdu for pdu in found)
    transaction = receipt.transaction_of("origin.example", "id", found)
    assert len(transaction.fingerprint()) == 32
    limit = LimitConfig(1.0, 1)
    config = FederationConfig(Mode.REJECT, limit, limit, limit, None)
    homeserver: Any = _Homeserver()
    area: Any = _Receipt()
    deferred: Any = _Deferred()
    report = LimitReport(homeserver.now_ms, METRICS.limits)
    handler = ReceiptHandler(homeserver, area, deferred, config, report)
    results: list[Refusal | None] = []
    for name in ("one", "two"):
        check = handler.check(attr.evolve(transaction, transaction_id=name))
        ensureDeferred(check).addCallback(results.append)
    ends_ms = [sticky_until_ms(pdu[FIELD], pdu.get("origin_server_ts"), NOW_MS) for pdu in found]
    unexpired = [until_ms for until_ms in ends_ms if until_ms is not None and until_ms > NOW_MS]
    assert results[0] is None, "the first finds the buckets full"
    assert (results[1] is not None) == bool(unexpired)


@pytest.mark.requirement("L3")
@given(pdu=pdus, received_ms=st.integers(0, 2**62))
def test_staged_pdu(pdu: Any, received_ms: int) -> None:
    pdu = read(pdu)
    homeserver: Any = _Homeserver()
    area: Any = None
    staged = StagedPdu("$event", pdu.get(FIELD), pdu.get("origin_server_ts"), received_ms)
    assert PruningHandler(homeserver, area).is_exempt(staged) in (True, False)
    for v1_format in (True, False):
        assert all(isinstance(p, str) for p in prev_event_ids_of(pdu, v1_format))


@attr.s(auto_attribs=True)
class _Request:
    args: dict[bytes, list[bytes]]


@pytest.mark.requirement("S3")
@given(values=st.lists(st.binary(max_size=30) | st.from_regex(rb"\A[0-9]{1,18}\Z"), max_size=2))
def test_parameter(values: list[bytes]) -> None:
    request = _Request({b"org.matrix.msc4354.sticky_duration_ms": values} if values else {})
    if not values:
        assert sending.sticky_duration_ms(request) is None
    elif values[0].isdigit() and int(values[0]) < 2**53 and len(values[0]) <= 16:
        assert sending.sticky_duration_ms(request) == int(values[0])
    else:
        with pytest.raises(SynapseError) as refused:
            sending.sticky_duration_ms(request)
        assert (refused.value.code, refused.value.errcode) == (400, "M_INVALID_PARAM")


positions = st.builds(
    Position,
    st.integers(INT64[0], INT64[-1]),
    st.dictionaries(st.sampled_from(["master", "worker", "\ud800"]), st.integers(0, 2**62)),
)


@pytest.mark.requirement("D5")
@given(token=positions)
def test_token_of_a_page(token: Position) -> None:
    found = position_of_page(token, ["master"])
    assert found is None or isinstance(found.writers, Mapping)


def only_says_what_is_wrong(function: Any, *arguments: Any) -> None:
    with contextlib.suppress(TypeError, ValueError):
        function(*arguments)


rows = st.lists(
    st.lists(scalars, min_size=6, max_size=6).map(tuple)
    | st.lists(scalars, min_size=9, max_size=9).map(tuple),
    max_size=3,
)
good_rows = st.lists(
    st.tuples(st.integers(0, 100), st.just("master"), texts, texts, texts, numbers), max_size=3
)


@given(rows=rows | good_rows | anything, arguments=st.lists(anything, min_size=8, max_size=8))
def test_index(rows: Any, arguments: list[Any]) -> None:
    index = StickyIndex("server.example")
    only_says_what_is_wrong(index.insert, rows)
    before = len(index)
    for function, count in (
        (index.events_in_rooms, 7),
        (index.events_by_room, 7),
        (index.present_by_room, 8),
        (index.own_events, 4),
        (index.server_count, 2),
        (index.get, 1),
        (index.in_step, 1),
    ):
        only_says_what_is_wrong(function, *arguments[:count])
    assert len(index) == before


@given(arguments=st.lists(anything, min_size=5, max_size=5))
def test_limits_and_release_queue(arguments: list[Any]) -> None:
    limiter, queue = Limiter({"per_server": (1.0, 1)}, 8), ReleaseQueue()
    only_says_what_is_wrong(limiter.admit_transaction, *arguments[:3])
    only_says_what_is_wrong(limiter.admit_user, *arguments[:2])
    only_says_what_is_wrong(queue.admit, limiter, *arguments[:4])
    only_says_what_is_wrong(queue.add, *arguments)
    only_says_what_is_wrong(queue.take, limiter, *arguments[:2])
    only_says_what_is_wrong(queue.expire, *arguments[:2])
    only_says_what_is_wrong(queue.remove, arguments[0])
    assert len(queue) <= 1
