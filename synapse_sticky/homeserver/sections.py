"""What a section of sticky events has, by room."""

from collections.abc import Mapping


def together(
    by_room: Mapping[str, list[str]], more: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """The events of both, each once; the earlier ones first."""
    found = {room_id: dict.fromkeys(event_ids) for room_id, event_ids in more.items()}
    for room_id, event_ids in by_room.items():
        found.setdefault(room_id, {}).update(dict.fromkeys(event_ids))
    return {room_id: list(event_ids) for room_id, event_ids in found.items()}
