"""What is kept of each version, and the table of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.compat import results
from tests.compat.results import BEGIN, END, PASSED, STORY, Result, read_check, table, with_table


def result_of(check: dict[str, Any], story: dict[str, str]) -> Result:
    """As of a run on the version that the check names."""
    return Result(check["synapse"], check, story)


ALL_PASSED = dict.fromkeys(STORY, PASSED)


def check(synapse: str, exit_code: int, **duties: list[str]) -> dict[str, Any]:
    """What the check prints, with the misfits of some duties."""
    states = {
        name: {"state": "unfit" if misfits else "on", "misfits": misfits}
        for name, misfits in duties.items()
    }
    access = {"state": "on", "misfits": []}
    said: dict[str, Any] = {"synapse": synapse, "exit_code": exit_code, "duties": states}
    return {**said, "seams": 176, "access": access, "problems": []}


def cells(result: Result) -> list[str]:
    """Of its row, without the version's."""
    return [cell.strip() for cell in result.row().split("|")[2:-1]]


def test_all_fits() -> None:
    result = result_of(check("1.163.1", 0, joins=[]), ALL_PASSED)
    assert result.problems() == []
    assert cells(result) == ["fits", "yes", "yes", "yes", "yes"]


def test_a_duty_does_not_fit_a_later_synapse() -> None:
    result = result_of(check("1.170.0", 1, joins=["a.b is not there"], index=[]), ALL_PASSED)
    assert result.problems() == ["check: exit code 1, should be 0: joins: a.b is not there"]
    assert cells(result) == ["**partly**: without joins", "yes", "yes", "yes", "yes"]


def test_a_part_of_the_story_fails() -> None:
    result = result_of(check("1.163.1", 0), {**ALL_PASSED, "flood": "failed"})
    assert result.problems() == ["story, flood: failed"]
    assert cells(result) == ["fits", "yes", "**no**", "yes", "yes"]


def test_a_part_that_was_not_told_is_no_yes() -> None:
    result = result_of(check("1.163.1", 0), {})
    assert len(result.problems()) == len(STORY)
    assert cells(result) == ["fits", *["**no**"] * len(STORY)]


def test_no_answer_of_the_check_is_no_fits() -> None:
    assert cells(Result("1.163.1", None, ALL_PASSED))[0] == "**no answer**"


def test_an_old_synapse_must_be_refused_and_say_why() -> None:
    old = check("1.162.0", 2, index=["x is not there"])
    result = result_of(old, {"refusal": PASSED})
    assert result.problems() == []
    assert cells(result) == ["does not fit; Synapse refuses to start", *["-"] * len(STORY)]
    assert result_of(check("1.162.0", 2), {"refusal": PASSED}).problems() == [
        "check: it does not say why this Synapse does not fit"
    ]
    assert result_of(old, {"refusal": "failed"}).problems() == ["story, refusal: failed"]
    (problem,) = result_of(check("1.162.0", 0), {"refusal": PASSED}).problems()
    assert problem.startswith("check: exit code 0, should be 2")


def test_what_is_kept_is_the_same_on_every_machine() -> None:
    where = "cannot import name 'X' from 'synapse.types' (/home/me/env/lib/python3.12"
    misfits = [f"{where}/site-packages/synapse/types/__init__.py)", "<function f at 0x7f3a5d2c10>"]
    read = read_check(json.dumps({**check("1.162.0", 2, joins=misfits), "module": "0.2.0"}))
    assert read["duties"]["joins"]["misfits"] == [
        "cannot import name 'X' from 'synapse.types' (synapse/types/__init__.py)",
        "<function f at 0x...>",
    ]
    assert "module" not in read


@pytest.mark.parametrize("printed", ["", "usage: check", "[]", "{}"])
def test_other_output_is_no_check(printed: str) -> None:
    with pytest.raises(ValueError, match="it printed"):
        read_check(printed)


def test_a_table_that_is_not_of_what_is_kept_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "versions.md"
    monkeypatch.setattr(results, "FOLDER", tmp_path / "compat")
    monkeypatch.setattr(results, "PAGE", page)
    monkeypatch.setattr(results, "LISTED", ("1.163.9", "1.163.10"))
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    result_of(check("1.163.10", 0), ALL_PASSED).keep()
    results.write_table()
    assert results.stale() == ["Nothing is kept of Synapse 1.163.9: make compat"]
    result_of(check("1.163.9", 0), ALL_PASSED).keep()
    assert results.stale() == ["docs/versions.md's table is stale: python -m tests.compat --table"]
    results.write_table()
    assert results.stale() == []
    assert [result.synapse for result in results.kept()] == ["1.163.9", "1.163.10"]
    text = page.read_text()
    assert text == f"before\n{BEGIN}\n\n{table(results.kept())}\n\n{END}\nafter\n"
    page.write_text("no markers")
    assert results.stale() == [f"docs/versions.md has not one {BEGIN} and one {END}"]
    with pytest.raises(ValueError, match="has not one"):
        with_table("no markers", [])
