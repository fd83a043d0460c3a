"""A spam checker, loaded into a homeserver beside whatever else: for tests only."""

import os
from pathlib import Path
from typing import Any

from synapse.events import EventBase
from synapse.module_api import NOT_SPAM, ModuleApi, errors

SPAM_CHECKER = "tests.lab.spam.SpamChecker"
JOIN_HOLDER = "tests.lab.spam.JoinHolder"
_HOLD, _HELD = "hold", "held"


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
    # Opened to read and to write it keeps nobody waiting, and ends the reading as it is closed.
    pipe = os.open(folder / _HOLD, os.O_RDWR)
    (folder / _HOLD).unlink()
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
