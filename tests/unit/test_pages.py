"""The table of sliding sync's pages: whose, for how long, and which is taken (D4, D5)."""

import asyncio
import itertools
from typing import Any, cast

import pytest

from synapse_sticky.handlers.sliding.pages import Older, Page, Shown
from synapse_sticky.handlers.sliding.tables import PageTable
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.index import Position
from tests.unit.process import Process

MINUTE_MS = 60_000
HERE = ("@me:here", "DEVICE", "one")
ELSEWHERE = ("@me:here", "DEVICE", "two")
OTHER_DEVICE = ("@me:here", "OTHER", "one")
TOKEN = Position(3, {"first": 4})


class World:
    def __init__(self) -> None:
        self.process = cast(Any, Process())
        self.table = PageTable(self.process)
        asyncio.run(migrate(self.process, self.table))

    def store(self, connection: tuple[str, str, str], token: Position, page: Page) -> None:
        asyncio.run(self.table.store(connection, token, page))

    def read(self, connection: tuple[str, str, str], token: Position = TOKEN) -> Page | None:
        return asyncio.run(self.table.read(connection, token))

    def latest(self, connection: tuple[str, str, str]) -> list[Page]:
        return asyncio.run(self.table.latest(connection))


def page(number: int) -> Page:
    older = Older(frozenset({"!a"}), Position(0), Position(number))
    return Page((older,), Shown(Position(number, {"first": number + 1}), 7), Position(number))


@pytest.mark.requirement("D4", "D5")
def test_a_connection_may_have_another_name_than_before() -> None:
    world = World()
    assert world.read(HERE) is None
    world.store(HERE, TOKEN, page(1))
    assert world.read(HERE) == world.read(ELSEWHERE) == page(1)
    assert world.read(HERE, Position(3)) is world.read(OTHER_DEVICE) is None
    world.store(ELSEWHERE, TOKEN, page(2))
    assert (world.read(HERE), world.read(ELSEWHERE)) == (page(1), page(2))
    world.store(HERE, TOKEN, page(3))
    assert world.read(HERE) == page(3), "the same request once more"


@pytest.mark.requirement("D4")
def test_the_latest_pages_come_first_and_not_all_of_them() -> None:
    world = World()
    world.store(HERE, TOKEN, Page(()))
    world.store(OTHER_DEVICE, TOKEN, page(5))
    assert world.latest(HERE) == [], "none of them says which rooms it took into account"
    for number in range(1, 151):
        world.process.pass_ms(1)
        world.store(HERE if number % 2 else ELSEWHERE, Position(number), page(number))
    expected = [without_older(page(number)) for number in range(150, 50, -1)]
    assert world.latest(HERE) == world.latest(ELSEWHERE) == expected


def without_older(stored: Page) -> Page:
    return Page((), stored.shown, stored.until)


@pytest.mark.requirement("H3")
def test_pages_are_kept_for_little_more_than_an_hour() -> None:
    world = World()
    for minute in itertools.count():
        world.store(HERE, Position(minute + 1), page(1))
        if world.read(HERE, Position(1)) is None:
            break
        world.process.pass_ms(MINUTE_MS)
    assert 60 < minute <= 70
