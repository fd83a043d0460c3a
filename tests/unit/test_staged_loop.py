"""The look at what is staged, every minute."""

from pathlib import Path

import pytest

from synapse_sticky.homeserver.staged import begin_on_staged_pdus
from tests.unit.members import World


@pytest.mark.requirement("H1")
def test_it_keeps_its_logging_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Else CPU time and log lines of others count as its own."""
    world = World(tmp_path, None)
    try:
        with world.process() as process:
            asked: list[float] = []
            store = process.store
            original = store.get_all_rooms_with_staged_incoming_events

            async def counting() -> object:
                asked.append(world.reactor.seconds())
                await process.give_way()
                return await original()

            store.get_all_rooms_with_staged_incoming_events = counting
            begin_on_staged_pdus(process)
            for _ in range(3):
                world.take_turns()
                world.reactor.advance(60)
            world.take_turns()
    finally:
        world.close()
    assert len(asked) == 1 + 3
    assert [r.getMessage() for r in caplog.records if r.name == "synapse.logging.context"] == []
