"""Spam checkers and a rule, loaded into a homeserver beside whatever else: for tests only."""

import os
from pathlib import Path
from typing import Any

from synapse.events import EventBase
from synapse.module_api import NOT_SPAM, ModuleApi, errors

SPAM_CHECKER = "tests.lab.spam.SpamChecker"
JOIN_HOLDER = "tests.lab.spam.JoinHolder"
PARTIAL_STATE = "tests.lab.spam.PartialState"
PARTIAL_STATE_HOLDER = "tests.lab.spam.PartialStateHolder"
DUMMY_RULE = "tests.lab.spam.DummyRule"
_HOLD, _HELD = "hold", "held"
_HOLD_STATE = "hold-state"
_REFUSED = "refused"


class SpamChecker:
    """Refuses events whose body is ``spam``."""

    def __init__(self, config: Any, api: ModuleApi) -> None:
        api.register_spam_checker_callbacks(check_event_for_spam=self._check)

    @staticmethod
    async def _check(event: EventBase) -> Any:
        return errors.Codes.FORBIDDEN if event.content.get("body") == "spam" else NOT_SPAM


def hold_joins(folder: Path) -> None:
    """Has the server whose folder this is take its time with whoever joins."""
    os.mkfifo(folder / _HOLD)


def holds_a_join(folder: Path) -> bool:
    """Has one come?"""
    return (folder / _HELD).exists()


def release_joins(folder: Path) -> None:
    """Ends that."""
    _release(folder / _HOLD)


def _release(path: Path) -> None:
    # Opened to read and to write it keeps nobody waiting, and ends the reading as it is closed.
    pipe = os.open(path, os.O_RDWR)
    path.unlink()
    os.close(pipe)


class JoinHolder:
    """Holds joins up when it is told."""

    def __init__(self, config: Any, api: ModuleApi) -> None:
        self._api = api
        api.register_spam_checker_callbacks(check_event_for_spam=self._check)

    async def _check(self, event: EventBase) -> Any:
        if event.content.get("membership") == "join" and Path(_HOLD).exists():
            Path(_HELD).touch()
            await self._api.defer_to_thread(Path(_HOLD).read_bytes)
        return NOT_SPAM


class PartialState:
    """Never asks for the members that an answer to a join left out."""

    def __init__(self, config: Any, api: ModuleApi) -> None:
        async def sync_nothing(*args: Any, **options: Any) -> None: ...

        handler = api._hs.get_federation_handler()
        setattr(handler, "_sync_partial_state_room", sync_nothing)  # noqa: B010


def hold_state(folder: Path) -> None:
    """Has the server whose folder this is take its time with the rooms that it joins from now on:
    their state stays partial."""
    os.mkfifo(folder / _HOLD_STATE)


def release_state(folder: Path) -> None:
    """Ends that."""
    _release(folder / _HOLD_STATE)


class PartialStateHolder:
    """Asks for the members that an answer to a join left out once it is told."""

    def __init__(self, config: Any, api: ModuleApi) -> None:
        handler: Any = api._hs.get_federation_handler()
        original = getattr(handler, "_sync_partial_state_room")  # noqa: B009

        async def hold(*args: Any, **options: Any) -> None:
            if Path(_HOLD_STATE).exists():
                await api.defer_to_thread(Path(_HOLD_STATE).read_bytes)
            await original(*args, **options)

        setattr(handler, "_sync_partial_state_room", hold)  # noqa: B010


def refuse_dummy_events(folder: Path, room_id: str) -> None:
    """Has the server whose folder this is refuse all dummy events to the room."""
    (folder / _REFUSED).write_text(room_id)


def allow_dummy_events(folder: Path) -> None:
    """Ends that."""
    (folder / _REFUSED).unlink()


class DummyRule:
    """Refuses dummy events when it is told."""

    def __init__(self, config: Any, api: ModuleApi) -> None:
        api.register_third_party_rules_callbacks(check_event_allowed=self._check)

    async def _check(self, event: EventBase, state: Any) -> Any:
        is_dummy = event.type == "org.matrix.dummy_event"
        refused = Path(_REFUSED)
        return (
            not is_dummy or not refused.exists() or refused.read_text() != event.room_id,
            None,
        )
