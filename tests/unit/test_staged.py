"""What it costs to process one PDU while many are staged for its room (D7, L3, H3)."""

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from synapse.api.room_versions import RoomVersions
from synapse.app.homeserver import SynapseHomeServer

from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.pruning.handler import PruningHandler
from synapse_sticky.handlers.staging.pruning.synapse import SynapsePruning
from synapse_sticky.handlers.staging.turns.handler import PAGE, TurnsHandler
from synapse_sticky.handlers.staging.turns.pdu import WaitingPdu
from synapse_sticky.handlers.staging.turns.room import PRUNE_FROM, StagedRoom
from synapse_sticky.handlers.staging.turns.synapse import SynapseTurns
from synapse_sticky.handlers.staging.turns.waiting import WaitingOrigins
from tests.unit.staging import STAGING, CountingStore, has_no_scan, prepared
from tests.unit.test_limits_in_synapse import HOUR_MS, ROOM, done

STEP_MS = 30
ORIGINS = ("a", "b", "c", "d")
WITH_TURNS, WITHOUT = True, False


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def hs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SynapseHomeServer]:
    with prepared(request.param, tmp_path_factory.mktemp("homeserver")) as hs:
        yield hs


@pytest.fixture
def store(hs: SynapseHomeServer) -> Iterator[CountingStore]:
    with closing(CountingStore(hs)) as store:
        yield store
        store.sql(f"DELETE FROM {STAGING}")


class Processing:
    """Does with staged PDUs what Synapse does, but for persisting them."""

    def __init__(self, store: CountingStore, has_turns: bool) -> None:
        self.store = store
        pruning = SynapsePruning(store)
        PruningHandler(store, pruning).install()
        if has_turns:
            held = Held()
            self.turns = turns = TurnsHandler(store, SynapseTurns(store, held), held)
            turns.install()
            pruning.prune_by(turns.take_prunable)
            # It learns of them as they come.
            for _ in range(12):
                self.next()

    def next(self) -> tuple[str, str] | None:
        found: tuple[str, str] | None = done(
            self.store.store.get_next_staged_event_id_for_room(ROOM)
        )
        return found

    def process(self) -> bool:
        """One PDU; gives whether others were pruned."""
        key = self.next()
        assert key is not None
        done(self.store.store.remove_received_event_from_staging(*key))
        self.store.now += STEP_MS
        return self.prune()

    def prune(self) -> bool:
        pruned: bool = done(self.store.store.prune_staged_events_in_room(ROOM, RoomVersions.V11))
        return pruned

    def most(self, count: int) -> tuple[int, int]:
        """Of so many PDUs, the most rows and statements that one took."""
        rows = statements = 0
        for _ in range(count):
            before = self.store.rows, len(self.store.statements)
            self.process()
            rows = max(rows, self.store.rows - before[0])
            statements = max(statements, len(self.store.statements) - before[1])
        return rows, statements


def stage_chains(store: CountingStore, name: str, count: int, sticky_ms: int = HOUR_MS) -> None:
    for origin in ORIGINS:
        ids = [f"${name}-{origin}{number}" for number in range(count // len(ORIGINS))]
        store.stage_chain(origin, ROOM, ids, sticky_ms)
    store.analyze()


@pytest.mark.requirement("D7", "L3", "H3")
def test_a_pdu_costs_the_same_however_many_are_staged(store: CountingStore) -> None:
    """Also while all that is known is compared with what is staged."""
    most = []
    for count in (5_000, 20_000):
        stage_chains(store, f"{count}", count)
        processing = Processing(store, WITH_TURNS)
        store.now += 2_000
        # The second half of these is after a comparison has begun.
        store.reset()
        first = processing.most(150)
        store.now += 10_000
        most.append((*first, *processing.most(150)))
        assert has_no_scan(store.plans(), store.is_postgres)
        store.sql(f"DELETE FROM {STAGING}")
    assert most[1] == most[0]
    assert most[0][0] <= 8
    assert most[0][2] <= 8 + PAGE
    assert max(most[0][1], most[0][3]) <= 8


@pytest.mark.requirement("L3", "H3")
def test_what_can_be_pruned_is_not_looked_for(store: CountingStore) -> None:
    """What has expired goes as well, some for each PDU, and what is sticky stays."""
    stage_chains(store, "long", 200)
    stage_chains(store, "short", 2_000, 60_000)
    processing = Processing(store, WITH_TURNS)
    store.reset()
    assert not any(processing.process() for _ in range(20))
    store.now += 60_000
    store.reset()
    pruned = 0
    while processing.prune():
        pruned += 1
    assert store.rows == 0
    assert pruned == 2_000 // 250
    left = {event_id for (event_id,) in store.sql(f"SELECT event_id FROM {STAGING}")}
    # The last of each is referred to by none.
    assert len([event_id for event_id in left if event_id.startswith("$short")]) == len(ORIGINS)
    assert len([event_id for event_id in left if event_id.startswith("$long")]) == 200 - 20
    assert has_no_scan(store.plans(), store.is_postgres)
    # Nothing of that is chosen, and nothing is left.
    for _ in range(200 - 20 + len(ORIGINS)):
        processing.process()
    assert processing.next() is None


@pytest.mark.requirement("L3", "H3", "H5")
def test_without_turns_it_is_looked_at_in_pages(store: CountingStore) -> None:
    """So a look costs the same however many are staged, and nothing is remembered of them."""
    for count in (4_000, 20_000):
        stage_chains(store, f"{count}", count, 60_000)
        processing = Processing(store, WITHOUT)
        assert not processing.prune()
        store.reset()
        assert not any(processing.prune() for _ in range(100))
        assert store.rows == 0
        assert not processing.prune()
        assert store.rows == 1_000 + 1
        assert has_no_scan(store.plans(), store.is_postgres)
        # Once they have expired nothing of them stays but what others do not refer to.
        store.now += 60_000
        pruned = sum(processing.prune() for _ in range(250))
        assert pruned == count // 1_000
        assert store.sql(f"SELECT COUNT(*) FROM {STAGING}") == [(pruned,)]
        store.sql(f"DELETE FROM {STAGING}")


@pytest.mark.requirement("L3", "H3")
def test_without_turns_all_have_their_turn_to_be_looked_at(store: CountingStore) -> None:
    """Also those that were received in the same millisecond, behind others that stay."""
    ids = [f"$sticky{number:04}" for number in range(2_500)]
    store.stage("a", ROOM, ids, HOUR_MS)
    store.stage_chain("b", ROOM, ["$w", "$x", "$y", "$z"])
    processing = Processing(store, WITHOUT)
    assert any(processing.prune() for _ in range(2 * 101 + 1))
    left = {event_id for (event_id,) in store.sql(f"SELECT event_id FROM {STAGING}")}
    assert left == {*ids, "$z"}


@pytest.mark.requirement("L3", "H3")
def test_staged_pdus_are_parsed_in_the_thread_of_the_transaction(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_chains(store, "short", 200, 60_000)
    transact, loads, depth, parsed = store.transact, json.loads, 0, list[int]()

    async def transact_counting(what: str, function: Any, *args: Any) -> Any:
        def run_txn(txn: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return function(txn, *args)
            finally:
                depth -= 1

        return await transact(what, run_txn)

    def loads_noting(text: str) -> Any:
        parsed.append(depth)
        return loads(text)

    monkeypatch.setattr(store, "transact", transact_counting)
    monkeypatch.setattr(json, "loads", loads_noting)
    Processing(store, WITHOUT).prune()
    assert parsed == [1] * 200


@pytest.mark.requirement("L3", "H1", "H3")
def test_a_room_that_turns_have_forgotten_is_not_read_for_pruning(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_chains(store, "short", 2_000, 60_000)
    processing = Processing(store, WITH_TURNS)
    store.now += 60_000

    def fails(*args: object) -> None:
        raise LookupError("once")

    with monkeypatch.context() as patched:
        patched.setattr(processing.turns, "_choose_among_txn", fails)
        assert processing.next() is not None, "the first"
    store.reset()
    assert not processing.prune()
    assert store.statements == []
    # The next choice makes it known again.
    assert processing.next() is not None
    assert processing.prune()


@pytest.mark.requirement("D7", "H3")
def test_a_choice_looks_at_few_of_many_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = 0
    key_of = WaitingOrigins._key

    def counting(self: WaitingOrigins, origin: str) -> object:
        nonlocal keys
        keys += 1
        return key_of(self, origin)

    room = StagedRoom()
    for number in range(20_000):
        origin = f"server{number % 5_000}"
        room.add(WaitingPdu(origin, f"${number}", number, number, (), HOUR_MS))
    monkeypatch.setattr(WaitingOrigins, "_key", counting)
    now_ms, chosen = 20_000, []
    for _ in range(5_000):
        choice = room.choose(now_ms, lambda event_ids: set())
        assert choice is not None
        chosen.append(choice.turn_of)
        room.remove(choice.pdu.key)
        room.waiting.had_turn(choice.turn_of, now_ms)
        now_ms += STEP_MS
    assert len(set(chosen)) == 5_000
    assert keys <= 5_000 * 6


@pytest.mark.requirement("E3", "L3")
def test_what_is_kept_from_pruning_is_counted_once() -> None:
    room, before = StagedRoom(), ""
    for number in range(PRUNE_FROM + 10):
        # Every other one is sticky, and each is referred to but the last.
        until_ms = HOUR_MS if number % 2 else 0
        room.add(WaitingPdu("a", f"${number}", number, number, (before,), until_ms))
        before = f"${number}"
        if number < PRUNE_FROM - 1:
            assert room.take_kept() == 0, "plain Synapse would not prune yet"
    assert room.take_kept() == PRUNE_FROM // 2 + 4
    assert room.take_kept() == 0
    room.add(WaitingPdu("a", "$next", HOUR_MS, HOUR_MS, (before,), HOUR_MS))
    assert room.take_kept() == 1
