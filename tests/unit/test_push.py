"""The bookkeeping of one push: what goes out when, and what counts as delivered (P5, P7)."""

import random
from collections import Counter

import pytest

from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.joins.push import WATCH_AFTER_RECORD_MS, Push
from synapse_sticky.handlers.joins.sent import GRACE_MS, MOST_SENDS, PATIENT_ATTEMPTS
from tests.unit.pushes import choose

BACKOFF = Backoff(1_000, 8_000)
NOW_MS = 1_000_000


def own(*positions: int) -> list[tuple[int, str, str]]:
    return [(position, f"${position}", "@user:here") for position in positions]


def push_of(*positions: int, window: int = 10, is_known_there: bool = True) -> Push:
    """One for whose room the database had rows up to 100 when it was asked."""
    push = Push("there", "!room", position=0, watch_until_ms=NOW_MS + 3_600_000, backoff=BACKOFF)
    push.take_in_last_rows({"here": 100}, push.dirty_marks, NOW_MS)
    push.update(own(*positions), NOW_MS, window)
    if is_known_there:
        push.acknowledge("$of-before", NOW_MS)
    return push


def acknowledge_all(push: Push, event_ids: list[str], now_ms: int = NOW_MS) -> None:
    for event_id in event_ids:
        assert push.acknowledge(event_id, now_ms)


@pytest.mark.requirement("P5")
def test_oldest_first_and_no_more_than_the_window() -> None:
    push = push_of(3, 5, 7, 9, window=2)
    assert choose(push, 50, NOW_MS) == ["$3", "$5"]
    assert choose(push, 50, NOW_MS) == []
    acknowledge_all(push, ["$3", "$5"])
    assert choose(push, 50, NOW_MS) == [], "acknowledged is not yet out of the staging area"
    push.mark_delivered("$3")
    assert choose(push, 50, NOW_MS) == ["$7"]


def test_limit_of_a_transaction() -> None:
    assert choose(push_of(1, 2, 3), 2, NOW_MS) == ["$1", "$2"]


def test_after_the_watch_new_events_are_left_to_the_ordinary_queue() -> None:
    push = push_of(3, window=10)
    assert choose(push, 50, NOW_MS) == ["$3"]
    acknowledge_all(push, ["$3"])
    push.mark_delivered("$3")
    over_ms = push.watch_until_ms
    push.take_in_last_rows({"here": 100}, push.dirty_marks, over_ms)
    push.update(own(200), over_ms, 10)
    assert not push.is_open, "else it would never end in a busy room"
    # Unless Synapse says that it skipped some on the way.
    push.dirty_marks += 1
    push.update(own(200), over_ms, 10)
    assert choose(push, 50, over_ms) == ["$200"]


@pytest.mark.requirement("P3", "E2")
def test_what_this_process_sees_late_is_pushed_however_late() -> None:
    push = push_of(3)
    acknowledge_all(push, choose(push, 50, NOW_MS))
    push.mark_delivered("$3")
    # The clock may be set back meanwhile.
    push.catch_up_recorded(NOW_MS - 60_000)
    over_ms = push.watch_until_ms
    assert over_ms < NOW_MS
    assert not push.is_dirty(over_ms - 1)
    # Persisted before the join, or at least before the watch was over.
    assert push.is_dirty(over_ms)
    push.take_in_last_rows({"here": 90, "there": 200}, push.dirty_marks, over_ms)
    assert not push.is_dirty(over_ms + 1)
    push.update(own(3, 90, 200, 201), over_ms + 60_000, 10)
    assert choose(push, 50, over_ms + 60_000) == ["$90", "$200"]


def test_a_push_that_gets_dirty_while_the_database_is_asked_stays_dirty() -> None:
    push = push_of(3)
    dirty_marks = push.dirty_marks
    push.reopen_from(2)
    push.take_in_last_rows({"here": 100}, dirty_marks, NOW_MS)
    assert push.is_dirty(NOW_MS)


@pytest.mark.requirement("P7")
def test_unacknowledged_events_go_out_again_ever_later() -> None:
    push = push_of(1)
    now_ms = NOW_MS
    delays_ms = []
    for _ in range(6):
        assert choose(push, 50, now_ms) == ["$1"]
        due_ms = push.next_due_ms(now_ms)
        assert due_ms is not None
        assert choose(push, 50, due_ms - 1) == []
        delays_ms.append(due_ms - now_ms)
        now_ms = due_ms
    for delay_ms, expected_ms in zip(delays_ms, (1, 2, 4, 8, 8, 8), strict=True):
        assert 800 * expected_ms <= delay_ms <= 1_200 * expected_ms


def test_events_that_never_get_through_do_not_block_the_others() -> None:
    push = push_of(1, 2, 3, window=1)
    acknowledge_all(push, choose(push, 50, NOW_MS))
    push.mark_delivered("$1")
    now_ms = NOW_MS
    for _ in range(PATIENT_ATTEMPTS + 1):
        assert choose(push, 50, now_ms) == ["$2"]
        now_ms = push.next_due_ms(now_ms) or now_ms
    assert choose(push, 50, now_ms - 1) == ["$3"]


@pytest.mark.requirement("F3", "H3")
def test_a_newcomer_that_acknowledges_nothing_is_sent_one_event_at_a_time() -> None:
    """It may still be joining: each event is sent once more in its turn, not all of them."""
    push = push_of(1, 2, 3, window=10, is_known_there=False)
    now_ms = NOW_MS
    sent = [choose(push, 50, now_ms)]
    for _ in range(4):
        now_ms = push.next_due_ms(now_ms) or now_ms
        assert choose(push, 50, now_ms - 1) == []
        assert push.worth_sending(now_ms)
        sent.append(choose(push, 50, now_ms))
    assert sent == [["$1"], ["$2"], ["$3"], ["$1"], ["$2"]]
    # Once it knows the room, the rest follows at once.
    assert push.acknowledge("$2", now_ms)
    assert choose(push, 50, now_ms) == ["$1", "$3"]


@pytest.mark.requirement("P7", "H2", "H7")
def test_what_is_refused_goes_out_one_at_a_time_until_something_is_taken() -> None:
    push = push_of(1, 2, 3, 4, window=3)
    assert choose(push, 50, NOW_MS) == ["$1", "$2", "$3"]
    acknowledge_all(push, ["$1"])
    assert push.refuse({"$2", "$3", "$of-no-interest"}, NOW_MS) == 2
    assert choose(push, 50, NOW_MS) == []
    now_ms, sent = NOW_MS, []
    for _ in range(6):
        now_ms = push.next_due_ms(now_ms) or now_ms
        assert choose(push, 50, now_ms - 1) == []
        sent += choose(push, 50, now_ms)
        assert push.refuse(sent[-1:], now_ms) == 0, "that is nothing new"
    # What is refused is not staged there, so the window is no bound.
    assert sent == ["$4", "$2", "$3", "$4", "$2", "$3"]
    assert push.is_refused
    assert push.acknowledge("$3", now_ms)
    assert choose(push, 50, now_ms) == ["$2", "$4"]
    assert push.refuse(["$3"], now_ms) == 0, "of what it has it refused another copy"
    acknowledge_all(push, ["$2", "$4"], now_ms)
    for event_id in ("$1", "$2", "$3", "$4"):
        push.mark_delivered(event_id)
    push.update(own(1, 2, 3, 4), now_ms, 3)
    assert not push.is_open
    assert not push.is_refused
    assert push.position == 5


@pytest.mark.requirement("P7", "F3", "H2", "H7")
def test_a_newcomer_that_refuses_while_it_joins_gets_it_once_it_knows_the_room() -> None:
    push = push_of(1, 2, is_known_there=False)
    now_ms = NOW_MS
    for event_id in ("$1", "$2", "$1"):
        now_ms = push.next_due_ms(now_ms) or now_ms
        assert choose(push, 50, now_ms) == [event_id]
        assert push.refuse([event_id], now_ms) == 0
    # Something of the room went by the ordinary queue.
    assert not push.acknowledge("$of-no-interest", now_ms)
    assert choose(push, 50, now_ms) == ["$1", "$2"]


@pytest.mark.requirement("P7", "H7")
def test_once_the_cause_may_be_over_what_was_refused_is_tried_at_once() -> None:
    push = push_of(1, 2, 3)
    now_ms = NOW_MS
    for _ in range(20):
        push.refuse(choose(push, 50, now_ms), now_ms)
        now_ms = push.next_due_ms(now_ms) or now_ms
    push.refuse(choose(push, 50, now_ms), now_ms)
    assert choose(push, 50, now_ms) == []
    push.try_now(now_ms, is_sent=False)
    (first,) = choose(push, 50, now_ms)
    assert choose(push, 50, now_ms) == [], "it may be too early there"
    push.refuse([first], now_ms)
    soon_ms = push.next_due_ms(now_ms) or 0
    assert soon_ms - now_ms <= 1.2 * BACKOFF.min_ms
    (next_one,) = choose(push, 50, soon_ms)
    assert push.acknowledge(next_one, soon_ms)
    assert len(choose(push, 50, soon_ms)) == 2


@pytest.mark.requirement("P7", "H2", "H7")
def test_what_the_ordinary_queue_had_refused_goes_out_again() -> None:
    push = push_of(3, 101)
    push.refuse(["$3", "$101"], NOW_MS)
    assert choose(push, 50, NOW_MS) == []
    now_ms, sent = NOW_MS, []
    for _ in range(2):
        now_ms = push.next_due_ms(now_ms) or now_ms
        sent += choose(push, 50, now_ms)
    assert sent == ["$3", "$101"]


@pytest.mark.requirement("P7", "H7")
def test_what_the_ordinary_queue_had_refused_after_the_watch_is_due() -> None:
    push = push_of(3)
    acknowledge_all(push, choose(push, 50, NOW_MS))
    push.mark_delivered("$3")
    over_ms = push.watch_until_ms
    push.take_in_last_rows({"here": 100}, push.dirty_marks, over_ms)
    push.update(own(200, 201), over_ms, 10)
    assert not push.is_open
    push.refused(201, "$201")
    assert push.is_dirty(over_ms), "the database is asked how much there is"
    push.take_in_last_rows({"here": 201}, push.dirty_marks, over_ms)
    push.update(own(200, 201), over_ms, 10)
    assert "$201" in choose(push, 50, over_ms)
    # It is not told twice of what it knows or is done with.
    marks = push.dirty_marks
    push.refused(201, "$201")
    push.refused(3, "$3")
    assert push.dirty_marks == marks


@pytest.mark.requirement("P7", "H2")
def test_a_newcomer_that_takes_one_and_refuses_the_rest() -> None:
    """Within an hour it is sent one event a minute, whatever their number."""
    backoff = Backoff(500, 300_000)
    push = Push("there", "!room", position=0, watch_until_ms=NOW_MS + 3_600_000, backoff=backoff)
    push.take_in_last_rows({"here": 100}, push.dirty_marks, NOW_MS)
    push.update(own(*range(1, 101)), NOW_MS, 10)
    now_ms, sent = NOW_MS, Counter[str]()
    while now_ms is not None and now_ms < NOW_MS + 3_600_000:
        chosen = choose(push, 50, now_ms)
        sent.update(chosen)
        push.refuse([e for e in chosen if e != "$1"], now_ms)
        if "$1" in chosen:
            push.acknowledge("$1", now_ms)
            push.mark_delivered("$1")
        now_ms = push.next_due_ms(now_ms)  # type: ignore[assignment]
    assert sent["$1"] == 1
    assert sent.total() <= 10 + 10 + 1.25 * 60
    assert push.is_open, "until they expire"


@pytest.mark.requirement("H1", "H2")
def test_an_event_that_is_always_refused_holds_up_no_other() -> None:
    push = push_of(*range(1, 31), window=10)
    now_ms, sent, taken = NOW_MS, Counter[str](), set()
    for _ in range(100):
        chosen = choose(push, 50, now_ms)
        sent.update(chosen)
        push.refuse({"$1"} & set(chosen), now_ms)
        for event_id in [e for e in chosen if e != "$1"]:
            push.acknowledge(event_id, now_ms)
            push.mark_delivered(event_id)
            taken.add(event_id)
        push.update(own(*range(1, 31)), now_ms, 10)
        now_ms = push.next_due_ms(now_ms) or now_ms + 1
        if len(taken) == 29:
            break
    assert now_ms - NOW_MS <= 10, "nothing waits for it"
    assert max(sent[e] for e in taken) == 1
    assert sent["$1"] <= 6


@pytest.mark.requirement("P7")
def test_what_was_lost_after_a_refusal_is_sent_again_all_the_same() -> None:
    """What it refused it never took."""
    push = push_of(1, 2)
    now_ms = NOW_MS
    for _ in range(2 * MOST_SENDS):
        push.refuse(choose(push, 50, now_ms), now_ms)
        now_ms = push.next_due_ms(now_ms) or now_ms
    (taken,) = choose(push, 50, now_ms)
    push.acknowledge(taken, now_ms)
    push.mark_lost(push.unconfirmed(), now_ms)
    assert taken in choose(push, 50, now_ms)


@pytest.mark.requirement("P7")
def test_what_is_refused_is_not_forgotten_when_all_is_sent_again() -> None:
    push = push_of(1, 2, 3)
    now_ms = NOW_MS
    push.refuse(choose(push, 50, now_ms)[:2], now_ms)
    push.acknowledge("$3", now_ms)
    for _ in range(3):
        push.refuse(choose(push, 50, now_ms), now_ms)
        now_ms = push.next_due_ms(now_ms) or now_ms
    push.mark_lost(push.unconfirmed(), now_ms)
    assert push.restart_if_lost()
    rows = [row for row in own(1, 2, 3) if row[0] not in push.finished]
    push.update(rows, now_ms, 10)
    assert {sent.event_id for sent in push.sent} >= {"$1", "$2"}


@pytest.mark.requirement("F3")
def test_events_sent_after_the_join_are_left_to_the_ordinary_queue_first() -> None:
    push = push_of(101)
    assert push.is_open
    assert choose(push, 50, NOW_MS + GRACE_MS - 1) == []
    assert push.next_due_ms(NOW_MS) == NOW_MS + GRACE_MS
    assert choose(push, 50, NOW_MS + GRACE_MS) == ["$101"]


@pytest.mark.requirement("F3", "E4")
def test_the_watch_ends_soon_after_the_ordinary_queue_got_through() -> None:
    push = push_of(3, 101, is_known_there=False)
    until_ms = push.watch_until_ms
    # Something of another room.
    push.catch_up_recorded(NOW_MS)
    assert choose(push, 50, NOW_MS) == ["$3"]
    acknowledge_all(push, ["$3"])
    push.mark_delivered("$3")
    assert not push.acknowledge("$3", NOW_MS)
    # After a restart Synapse goes on where its ordinary queue got to: so far that is nowhere.
    assert push.watch_until_ms == until_ms
    assert push.acknowledge("$101", NOW_MS)
    assert not push.acknowledge("$of-no-interest", NOW_MS)
    push.catch_up_recorded(NOW_MS)
    assert push.watch_until_ms == NOW_MS + WATCH_AFTER_RECORD_MS
    push.catch_up_recorded(NOW_MS + 1)
    assert push.watch_until_ms == NOW_MS + WATCH_AFTER_RECORD_MS
    assert [sent.event_id for sent in push.unconfirmed()] == ["$101"]


@pytest.mark.requirement("F3")
def test_what_the_ordinary_queue_delivered_is_not_pushed() -> None:
    push = push_of(3, 4)
    push.dirty_marks += 1
    push.update(own(3, 4, 101), NOW_MS, 10)
    acknowledge_all(push, ["$3", "$101"])
    assert choose(push, 50, NOW_MS) == ["$4"]
    assert [sent.event_id for sent in push.unconfirmed()] == ["$3", "$101"]


@pytest.mark.requirement("S2")
def test_expired_and_redacted_events_are_forgotten() -> None:
    push = push_of(1, 2, 3)
    choose(push, 2, NOW_MS)
    assert push.update(own(3), NOW_MS, 10) == 2, "both were sent in vain"
    assert push.position == 3
    assert choose(push, 50, NOW_MS + 2_000) == ["$3"]
    push.acknowledge("$3", NOW_MS)
    assert push.update([], NOW_MS, 10) == 0
    assert not push.is_open
    assert push.expired_count == 2


def test_position_follows_what_is_done() -> None:
    push = push_of(3, 5, 7)
    acknowledge_all(push, choose(push, 50, NOW_MS))
    push.mark_delivered("$5")
    push.update(own(3, 5, 7), NOW_MS, 10)
    assert (push.backlog_position, push.position) == (0, 3)
    push.mark_delivered("$3")
    push.update(own(3, 5, 7), NOW_MS, 10)
    assert push.position == 7
    push.mark_delivered("$7")
    push.update(own(7), NOW_MS, 10)
    assert push.position == 8
    assert not push.is_open
    push.settle()
    assert push.backlog_position == 8


def test_a_lower_backlog_starts_over_from_there() -> None:
    push = push_of(3)
    acknowledge_all(push, choose(push, 50, NOW_MS))
    push.mark_delivered("$3")
    push.update(own(3), NOW_MS, 10)
    push.settle()
    push.reopen_from(2)
    push.update(own(2, 3), NOW_MS, 10)
    assert choose(push, 50, NOW_MS) == ["$2", "$3"]


@pytest.mark.requirement("L3")
def test_everything_goes_out_again_once_if_a_newcomer_has_lost_something() -> None:
    push = push_of(1, 2, 101)
    chosen = choose(push, 50, NOW_MS + GRACE_MS)
    assert push.count_resent(chosen) == 0
    acknowledge_all(push, chosen)
    push.mark_delivered("$2")
    assert push.mark_lost(push.unconfirmed()[:1], NOW_MS) == 0
    assert [sent.event_id for sent in push.unconfirmed()] == ["$101"]
    push.mark_delivered("$101")
    assert choose(push, 50, NOW_MS) == ["$1"]
    acknowledge_all(push, ["$1"])
    push.mark_delivered("$1")
    push.update(own(1, 2, 101), NOW_MS, 10)
    assert not push.is_open
    assert push.restart_if_lost()
    push.update(own(1, 2, 101), NOW_MS, 10)
    assert choose(push, 50, NOW_MS) == ["$2", "$101"], "the first one has been sent again already"
    assert push.count_resent(["$2", "$101"]) == 2
    acknowledge_all(push, ["$2", "$101"])
    assert push.mark_lost(push.unconfirmed(), NOW_MS) == 2, "it is given up"
    push.update(own(1, 2, 101), NOW_MS, 10)
    assert not push.is_open, "whatever the newcomer says"
    assert not push.restart_if_lost()


@pytest.mark.requirement("L3", "P7")
def test_what_was_acknowledged_goes_out_again_once_if_the_newcomer_was_away() -> None:
    push = push_of(1, 2, 3)
    acknowledge_all(push, choose(push, 2, NOW_MS))
    push.mark_present(["$1"], NOW_MS)
    push.suspect_loss()
    push.mark_present(["$2"], NOW_MS)
    assert push.unconfirmed() == []
    assert choose(push, 1, NOW_MS) == ["$2"]
    acknowledge_all(push, ["$2"])
    push.suspect_loss()
    push.mark_present(["$2"], NOW_MS)
    assert choose(push, 50, NOW_MS) == ["$3"]


@pytest.mark.requirement("P7")
def test_patience_begins_anew_with_what_came_before_and_not_with_what_came_later() -> None:
    push = push_of(1, 2, 3)
    choose(push, 50, NOW_MS)
    for number, event_id in enumerate(("$1", "$2", "$3")):
        push.acknowledge(event_id, NOW_MS + number)
    push.mark_present(["$2"], NOW_MS + 1_000)
    patient_from_ms = {sent.event_id: sent.patient_from_ms for sent in push.unconfirmed()}
    assert patient_from_ms == {"$1": NOW_MS, "$3": NOW_MS + 1_000}


@pytest.mark.requirement("H2")
def test_one_who_joins_again_lacks_what_came_since_and_what_was_not_confirmed() -> None:
    before = push_of(1, 2, 3, 4)
    acknowledge_all(before, choose(before, 50, NOW_MS))
    before.mark_present(["$1", "$3"], NOW_MS)
    before.update(own(1, 2, 3, 4), NOW_MS, 10)
    assert before.position == 2
    push = push_of(window=10)
    push.continue_from(before.position, before, NOW_MS + 5_000)
    push.update(own(2, 3, 4, 5), NOW_MS, 10)
    assert push.acknowledge("$2", NOW_MS)
    assert choose(push, 50, NOW_MS + 4_999) == [], "an acknowledgement does not bring it forward"
    assert push.next_due_ms(NOW_MS) == NOW_MS + 5_000
    assert choose(push, 50, NOW_MS + 5_000) == ["$4", "$5"]
    # Unless it says that it has lost even that.
    push.restart_in_full()
    push.update(own(1, 2, 3, 4, 5), NOW_MS, 10)
    assert choose(push, 50, NOW_MS + 5_000) == ["$1", "$3"]


@pytest.mark.requirement("P6")
def test_skipped_events_never_go_out() -> None:
    push = push_of(1, 2)
    push.skip([(1, "$1")])
    assert choose(push, 50, NOW_MS) == ["$2"]


def test_whatever_happens_all_is_delivered_and_the_window_kept() -> None:
    """A random newcomer, which acknowledges and has what it likes, ends up with everything."""
    for seed in range(50):
        chance = random.Random(seed)
        events = own(*range(1, 40))
        push = push_of(*(position for position, _, _ in events), window=chance.randint(1, 9))
        now_ms, delivered = NOW_MS, set()
        for _ in range(5_000):
            if not push.is_open:
                break
            push.update(events, now_ms, push.window)
            chosen = choose(push, 50, now_ms)
            assert len(chosen) <= push.window, seed
            for event_id in chosen:
                if chance.random() < 0.7:
                    push.acknowledge(event_id, now_ms)
            for sent in push.unconfirmed():
                if chance.random() < 0.7:
                    delivered.add(sent.event_id)
                    push.mark_delivered(sent.event_id)
                elif chance.random() < 0.5:
                    push.mark_lost([sent], now_ms)
                    delivered.add(sent.event_id)
            now_ms += chance.randint(1, 2_000)
        assert delivered == {event_id for _, event_id, _ in events}, seed


@pytest.mark.requirement("P7", "H3")
def test_what_happens_while_the_database_is_asked_counts() -> None:
    push = push_of(1, 2, 3, 4)
    chosen = push.next_events(50, NOW_MS)
    assert chosen == {"$1": 1, "$2": 2, "$3": 3, "$4": 4}
    assert push.acknowledge("$1", NOW_MS)
    push.skip([(2, "$2")])
    push.update(own(1, 4), NOW_MS, 10)
    assert push.send(chosen, NOW_MS) == ["$4"]
    assert choose(push, 50, NOW_MS) == []
    # And where nothing may be sent any more.
    push = push_of(1, 2)
    chosen = push.next_events(50, NOW_MS)
    push.is_blocked = True
    assert push.send(chosen, NOW_MS) == []
    push.is_blocked = False
    assert choose(push, 50, NOW_MS) == ["$1", "$2"]
