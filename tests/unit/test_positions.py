"""Up to where the sticky events stream is visible, by writer."""

from pathlib import Path
from typing import Any

import pytest

from synapse_sticky.index.synapse import SynapseStickyStream
from tests.unit.members import World


def general(stream: SynapseStickyStream, ids: Any) -> dict[str, int]:
    """As a token of Synapse's says it."""
    up_to, found = ids.get_current_token(), ids.get_positions()
    return {writer: max(found.get(writer, up_to), up_to) for writer in stream.writers}


@pytest.mark.requirement("D1")
def test_it_is_what_a_token_says(tmp_path: Path) -> None:
    world = World(tmp_path, None)
    try:
        with world.process() as process:
            stream = SynapseStickyStream(process)
            ids = process.store.get_sticky_events_stream_id_generator()
            (writer,) = stream.writers
            before = stream.positions()
            assert before == general(stream, ids)
            first, second = ids.get_next(), ids.get_next()
            first_id, second_id = (world.drive(one.__aenter__()) for one in (first, second))
            world.drive(second.__aexit__(None, None, None))
            # The first is not visible yet, so the second is not, either.
            assert stream.positions() == general(stream, ids) == before
            world.drive(first.__aexit__(None, None, None))
            assert stream.positions() == general(stream, ids) == {writer: second_id}
            assert first_id < second_id
            # With several writers each has its own.
            vars(stream)["writers"] = [writer, "other"]
            ids.advance("other", second_id + 5)
            assert stream.positions() == general(stream, ids)
            assert stream.positions()["other"] == second_id + 5
    finally:
        world.close()
