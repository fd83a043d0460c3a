"""A Synapse in which parts that one duty uses have changed, on real servers: that duty is off.

What plain Synapse does is seen, and the other duties go on. ``tests.unit.test_mutations`` changes
each part in each way, in one process.
"""

from collections.abc import Iterator
from contextlib import closing

import pytest

from synapse_sticky.duties import DUTIES, all_seams
from synapse_sticky.homeserver.seams import Table
from tests.conftest import Servers
from tests.integration.test_duties import (
    Row,
    Stage,
    each_row,
    is_as_without,
    is_told,
    those_that_need,
    unfit_parts,
)
from tests.lab import Lab, Peer
from tests.lab.scene import enter
from tests.lab.unfit import CHANGES, changes_for, duties_unfit_with, unfit_for
from tests.mutations import mutations

pytestmark = pytest.mark.one_process


@pytest.fixture
def newcomer(lab: Lab) -> Iterator[Peer]:
    with closing(lab.peer()) as started:
        yield started


@pytest.mark.slow
@each_row("H5")
def test_unfit(servers: Servers, peer: Peer, newcomer: Peer, row: Row) -> None:
    """What users notice is what they notice where the duty is switched off."""
    options = {"config": row.config, "metrics": True, "module_name": unfit_for(row.duty)}
    (server,) = servers(options)
    unfit = dict.fromkeys(duties_unfit_with(changes_for(row.duty)), "unfit")
    is_told(server, {**unfit, **dict.fromkeys(those_that_need(row), "off")})
    reasons = unfit_parts(server, row.duty)
    assert len(reasons) == (2 if row.duty == "sending" else 1)
    for change in changes_for(row.duty):
        named = f"table {change.seam.name}" if isinstance(change.seam, Table) else change.path
        assert (named in "; ".join(reasons)) == change.harms(change.seam), str(change)
    is_as_without(row, Stage(enter(server, peer), newcomer), row.plain)


@pytest.mark.requirement("H5")
def test_every_kind_of_change_is_met_on_a_real_server() -> None:
    assert list(CHANGES) == list(DUTIES)
    kinds = {mutation.kind for seam in all_seams() for mutation in mutations(seam)}
    assert {kind for changes in CHANGES.values() for _, kind, _ in changes} == kinds
    for duty in DUTIES:
        assert duties_unfit_with(changes_for(duty)).count(duty) == 1
