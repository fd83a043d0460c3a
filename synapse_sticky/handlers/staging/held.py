"""Staged PDUs that are passed over for now, and stay staged (L3, E4).

Synapse takes a PDU out of the staging area once it has tried to persist it. One that can be neither
persisted nor parked would then be in memory only, and gone with the process. It stays staged
instead: whoever goes on with the room after a crash, or in another process, finds it there.
"""

MOST_HELD = 100_000
"""About 30 MB."""


class Held:
    """Which PDUs of the staging area this process passes over.

    It is asked in database threads, too.

    is_heeded: whether what chooses the next PDU passes them over. Else none is held: Synapse would
        take the same one again and again.
    """

    def __init__(self) -> None:
        self.is_heeded = False
        # By origin and event ID: the room.
        self._rooms: dict[tuple[str, str], str] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._rooms

    def __len__(self) -> int:
        return len(self._rooms)

    def hold(self, key: tuple[str, str], room_id: str) -> bool:
        """From now on the PDU of this origin and ID stays staged, unless too many do. Gives whether
        it does."""
        if not self.is_heeded or (key not in self._rooms and len(self._rooms) >= MOST_HELD):
            return False
        self._rooms[key] = room_id
        return True

    def release(self, *keys: tuple[str, str]) -> None:
        """These are PDUs like any others again, if they were held."""
        for key in keys:
            self._rooms.pop(key, None)

    def rooms(self) -> dict[tuple[str, str], str]:
        """The room of each that is held, by its origin and event ID."""
        return dict(self._rooms)
