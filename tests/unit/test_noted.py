"""Which rows of the stream need no query, as this process has persisted them (H1)."""

import attr
import pytest

from synapse_sticky.index.noted import MOST_NOTED, NotedRows

pytestmark = pytest.mark.requirement("H1", "S5")


@attr.s(auto_attribs=True, frozen=True)
class Row:
    stream_id: int
    event_id: str


def noted(*stream_ids: int) -> NotedRows[Row]:
    rows: NotedRows[Row] = NotedRows()
    rows.note([Row(at, f"${at}") for at in stream_ids])
    return rows


def test_all_or_none() -> None:
    rows = noted(4, 5, 7)
    assert rows.all_between(3, 5) == [Row(4, "$4"), Row(5, "$5")]
    assert rows.all_between(5, 5) == []
    assert rows.all_between(3, 7) is None, "another process may have written the sixth"
    assert rows.all_between(2, 5) is None
    assert rows.all_between(0, 10**12) is None


def test_what_is_taken_in_is_dropped() -> None:
    rows = noted(4, 5, 6)
    rows.drop(5)
    assert list(rows) == [6]


def test_an_attempt_that_failed_counts_for_nothing() -> None:
    """Synapse calls back for earlier attempts of a transaction, too, which had other stream IDs."""
    rows = noted()
    rows.note([Row(4, "$a"), Row(5, "$b")])
    rows.note([Row(6, "$a")])
    assert rows.all_between(3, 4) is None
    assert rows.all_between(4, 6) == [Row(5, "$b"), Row(6, "$a")]


def test_a_change_has_all_of_it_read() -> None:
    rows = noted(4, 5)
    rows.forget_if_noted("$3")
    assert len(rows) == 2
    rows.forget_if_noted("$5")
    assert rows.all_between(3, 4) is None


def test_no_more_than_so_many() -> None:
    rows = noted()
    for at in range(10 * MOST_NOTED):
        rows.note([Row(at, f"${at}")])
        assert len(rows) <= MOST_NOTED
