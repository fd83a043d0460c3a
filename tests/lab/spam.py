"""A spam checker, loaded into a homeserver beside whatever else: for tests only."""

from pathlib import Path
from typing import Any

from synapse.events import EventBase
from synapse.module_api import NOT_SPAM, ModuleApi, errors

SPAM_CHECKER = "tests.lab.spam.SpamChecker"
JOIN_HOLDER = "tests.lab.spam.JoinHolder"
HOLD = "hold"
"""The file in the server's folder that holds joins up, for as long as it is there."""


class SpamChecker:
    """Refuses events whose body is ``spam``."""

    def __init__(self, config: Any, api: ModuleApi) -> None:
        api.register_spam_checker_callbacks(check_event_for_spam=self._check)

    @staticmethod
    async def _check(event: EventBase) -> Any:
        return errors.Codes.FORBIDDEN if event.content.get("body") == "spam" else NOT_SPAM


class JoinHolder:
    """Takes its time with whoever joins."""

    def __init__(self, config: Any, api: ModuleApi) -> None:
        self._api = api
        api.register_spam_checker_callbacks(check_event_for_spam=self._check)

    async def _check(self, event: EventBase) -> Any:
        while event.content.get("membership") == "join" and Path(HOLD).exists():
            await self._api.sleep(0.05)
        return NOT_SPAM
