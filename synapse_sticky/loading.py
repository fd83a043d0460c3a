"""Loading the duties that have tables of their own: after the start, and as often as it takes."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial

from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.duties import State
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.layout import NewerLayoutError

logger = logging.getLogger(__name__)

_BACKOFF = Backoff(5_000, 30_000, spread=0)
_PATIENCE_MS = 60_000

Load = Callable[[], Awaitable[None]]


class Loading:
    """The duties of this process that are on once their tables are there.

    Until then Synapse does as it does without the module. Each is loaded by itself; one that cannot
    be loaded is tried again until it can.
    """

    def __init__(self, homeserver: Homeserver, tell: Callable[[str, State], None]) -> None:
        """
        Args:
            tell: is called with a duty's name and state whenever that is another one.
        """
        self._homeserver = homeserver
        self._tell = tell
        self.duties: dict[str, Load] = {}
        self._ended: set[str] = set()
        self._deferral_ended = homeserver.new_signal()

    def begin(self) -> None:
        """Begins to load them, in the background."""
        if self.duties:
            self._homeserver.in_background("load", self._load_all)

    async def _load_all(self) -> None:
        for duty in self.duties:
            if duty != "parking":
                self._begin(duty)
        if "parking" in self.duties:
            # The PDUs that parking has processed at once are under the limits of deferral then.
            if "deferral" in self.duties.keys() - self._ended:
                await self._deferral_ended.wait(_PATIENCE_MS)
                if "deferral" not in self._ended:
                    logger.warning("parking does not wait for deferral any longer")
            self._begin("parking")

    def _begin(self, duty: str) -> None:
        Retrying(
            self._homeserver,
            f"load_{duty}",
            f"Could not load {duty}, which is off until then",
            partial(self._load, duty),
            _BACKOFF,
            is_said_once=True,
        ).wake()

    async def _load(self, duty: str) -> None:
        try:
            await self.duties[duty]()
            self._tell(duty, State.ON)
            logger.info("%s is on", duty)
        except NewerLayoutError as e:
            # Trying again does not help.
            logger.error("%s is off: %s", duty, e)
        self._ended.add(duty)
        if duty == "deferral":
            self._deferral_ended.fire()
