"""The module in a Synapse in which some of what one duty uses has changed, as ``tests.mutations``
changes it: for tests of the start only.

What is changed is there while the module starts, which is when it looks. Synapse goes on with its
own, so that everything can be shown that is not this duty's.
"""

from typing import Any, ClassVar

import pytest
from synapse.module_api import ModuleApi

from synapse_sticky import StickyEventsModule, wiring
from synapse_sticky.config import StickyConfig
from synapse_sticky.duties import DUTIES
from synapse_sticky.homeserver.database import read_columns
from synapse_sticky.homeserver.fitting import Columns
from tests.mutations import Mutation, mutations

CHANGES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "index": (
        ("_invalidate_caches_for_room_events", "renamed", "room_id"),
        ("add_replication_callback", "sync or async", ""),
    ),
    "delivery": (
        ("get_sticky_events_in_rooms", "renamed", "room_ids"),
        ("get_events", "one more is optional", ""),
    ),
    "sliding": (
        ("lists", "attribute gone", ""),
        ("must_await_full_state", "class gone", ""),
        ("SlidingSyncStickyEventsToken", "import gone", ""),
        ("current_state_delta_stream", "column gone", "instance_name"),
    ),
    "visibility": (
        ("filter_events_for_server", "another holder", ""),
        ("is_partial_state_room", "one more is optional", ""),
    ),
    "joins": (
        ("get_backlogged_sticky_events_for_destination", "removed", "limit"),
        ("_get_per_destination_queue", "another result", ""),
        ("destination_rooms_sticky_events_backlog", "table gone", ""),
        ("attempt_new_transaction", "a number", ""),
    ),
    "pruning": (
        ("prune_staged_events_in_room", "in another order", "room_id, room_version"),
        ("pdus_pruned_from_federation_queue", "import gone", ""),
        ("identifier", "attribute gone", ""),
    ),
    "parking": (
        ("try_acquire_lock", "one more is required", ""),
        ("rooms", "column of another kind", "room_id"),
        ("_process_incoming_pdus_in_room_inner", "sync or async", ""),
    ),
    "receipt": (
        ("on_incoming_transaction", "in another order", "origin, transaction_id"),
        ("get_received_txn_response", "another result", ""),
        ("federation_inbound_events_staging", "one more column", ""),
    ),
    "deferral": (
        ("insert_sticky_events_txn", "sync or async", ""),
        ("sticky_events", "column gone", "event_stream_ordering"),
        ("get_next_mult_txn", "other elements", ""),
    ),
    "sending": (
        ("add", "removed", "sticky_duration_ms"),
        ("messages_per_second", "class gone", ""),
        ("_do", "sync or async", ""),
        ("create_and_send_nonmember_event", "becomes optional", "event_dict"),
        ("on_PUT", "one more is required", ""),
    ),
    "extremities": (
        ("dummy_events_threshold", "attribute gone", ""),
        ("handle_new_client_event", "function gone", ""),
        ("acquire_read_write_lock", "one more is required", ""),
    ),
}
"""For each duty: the name of a part that it uses, the kind of change, and what that is about."""


def changes_for(duty: str) -> list[Mutation]:
    """What is changed."""
    return [_change(duty, *change) for change in CHANGES[duty]]


def _change(duty: str, part: str, kind: str, name: str) -> Mutation:
    return next(
        mutation
        for seam in DUTIES[duty].seams()
        if seam.name == part
        for mutation in mutations(seam)
        if (mutation.kind, mutation.name) == (kind, name)
    )


def duties_unfit_with(changes: list[Mutation]) -> list[str]:
    """The duties that need any of what is changed."""
    return [
        duty.name
        for duty in DUTIES.values()
        if any(change.harms(seam) for change in changes for seam in duty.seams())
    ]


class _InSynapseThatDoesNotFit(StickyEventsModule):
    duty: ClassVar[str]

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        changes = changes_for(self.duty)

        def read_changed(config: Any, server_name: str) -> tuple[Columns, list[str]]:
            columns, problems = read_columns(config, server_name)
            assert columns is not None, problems
            for change in changes:
                columns = change.columns(columns)
            return columns, []

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(wiring, "read_columns", read_changed)
            for change in changes:
                change.put(patched)
            super().__init__(config, api)


def unfit_for(duty: str) -> str:
    """The dotted path of the module in a Synapse that does not fit this duty."""
    return f"{__name__}.UnfitFor{duty.capitalize()}"


globals().update(
    {
        f"UnfitFor{duty.capitalize()}": type("Unfit", (_InSynapseThatDoesNotFit,), {"duty": duty})
        for duty in DUTIES
    }
)
