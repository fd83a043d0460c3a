"""A spam checker, loaded into a homeserver beside whatever else: for tests only."""

from typing import Any

from synapse.events import EventBase
from synapse.module_api import NOT_SPAM, ModuleApi, errors

SPAM_CHECKER = "tests.lab.spam.SpamChecker"


class SpamChecker:
    """Refuses events whose body is ``spam``."""

    def __init__(self, config: Any, api: ModuleApi) -> None:
        api.register_spam_checker_callbacks(check_event_for_spam=self._check)

    @staticmethod
    async def _check(event: EventBase) -> Any:
        return errors.Codes.FORBIDDEN if event.content.get("body") == "spam" else NOT_SPAM
