"""Which duty runs in which process, and what becomes of one that this Synapse does not fit."""

import logging
from contextlib import suppress

from synapse.module_api import ModuleApi
from synapse.module_api.errors import ConfigError

from synapse_sticky.config import LISTED_TWICE, StickyConfig, Strict
from synapse_sticky.duties import DUTIES, Duty, State, shared_misfits
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.access import Access
from synapse_sticky.homeserver.database import read_columns
from synapse_sticky.homeserver.seams import SeamMismatchError
from synapse_sticky.index import IndexFollower
from synapse_sticky.installer import Installer
from synapse_sticky.loading import Loading
from synapse_sticky.metrics import Metrics
from synapse_sticky.plan import (
    ACCESS,
    API,
    TABLES,
    WITHOUT_ACCESS,
    WITHOUT_ADMIN,
    by_name,
    decide,
    guarded,
    is_done_in,
    misfits_of_admin,
    of_part,
    that_stop,
)

logger = logging.getLogger(__name__)

_LOADED = "_synapse_sticky_is_loaded"
_LOADING = "loading"


class Wiring:
    """The duties of this process.

    Raises:
        ConfigError: see ``StickyEventsModule``.
    """

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        self._config = config
        self.states: dict[str, State] = {}
        # What the running Synapse lacks, by who needs it.
        self._misfits: dict[str, list[str]] = {}
        if problems := shared_misfits():
            self._all_unfit(problems, Metrics(api.server_name))
            return
        self._homeserver = Homeserver(api)
        if hasattr(self._homeserver.store, _LOADED):
            raise ConfigError(LISTED_TWICE)
        self._homeserver.enter(self._homeserver.store, _LOADED, True)
        self._loading = Loading(self._homeserver, self._set_loaded)
        self._installer = Installer(self._homeserver, config, self._loading)
        self._columns, self._misfits[TABLES] = read_columns(
            self._homeserver.hs.config, self._homeserver.server_name
        )
        self._homeserver.columns = self._columns
        try:
            for duty in DUTIES.values():
                self._begin(duty)
            self._begin_access()
            self._begin_admin()
            self._raise_if_strict()
        except Exception:
            self._homeserver.close()
            raise
        self._tell()
        self._loading.begin()

    def _all_unfit(self, problems: list[str], metrics: Metrics) -> None:
        if self._config.strict is not Strict.NO:
            raise SeamMismatchError(problems)
        logger.error("synapse-sticky is off, as this Synapse does not fit: %s", "; ".join(problems))
        metrics.set_duties(self._config.states_if_nothing_fits())

    def _begin(self, duty: Duty) -> None:
        """Installs the duty in this process, or says why not."""
        if not is_done_in(duty.name, self._homeserver.place):
            return
        decision = decide(duty, self._config, self.states, self._columns)
        if decision.missing:
            logger.warning("%s is off, as it needs %s", duty.name, ", ".join(decision.missing))
        state = decision.state
        for part, lacks in decision.parts:
            if problems := lacks or self._installer.install(duty.name, part.name):
                state = State.UNFIT
                self._misfits.setdefault(duty.name, []).extend(of_part(part, problems))
                name = f"{duty.name} ({part.name})" if part.name else duty.name
                _say_unfit(name, problems, part.without)
        # One with tables is on once these are there.
        self._set(duty.name, State.OFF if duty.name in self._loading.duties else state)

    @property
    def _follower(self) -> IndexFollower:
        return self._installer.follower

    def _begin_access(self) -> None:
        """Guards the sections, unless they are left to Synapse."""
        if not is_done_in(ACCESS, self._homeserver.place):
            return
        rows_of = None
        with suppress(Exception):  # who says what has expired, unless this Synapse does not fit
            rows_of = self._follower.rows_of
        guard = Access(self._homeserver, rows_of)
        names = guarded(self.states)
        guards = [guard.guard(name) for name in names]
        problems = [problem for _, found in guards for problem in found]
        self._misfits[ACCESS] = problems
        if not all(is_guarded for is_guarded, _ in guards):
            _say_unfit(ACCESS, problems, WITHOUT_ACCESS)
            self._set(ACCESS, State.UNFIT)
            return
        self._set(ACCESS, State.ON if names else State.OFF)

    def _begin_admin(self) -> None:
        """The API for administrators, in the processes that serve clients."""
        if not self._config.admin.enabled or not self._homeserver.place.serves("client"):
            return
        lacks = misfits_of_admin(self._columns)
        if problems := lacks or self._installer.install(API, ""):
            self._misfits[API] = problems
            _say_unfit(API, problems, WITHOUT_ADMIN)

    def _set(self, name: str, state: State) -> None:
        self.states[name] = state
        self._homeserver.metrics.set_duty(name, state.value)

    def _set_loaded(self, name: str, state: State) -> None:
        # Another part of it may not fit.
        self._set(name, State.UNFIT if self._misfits.get(name) else state)

    def _raise_if_strict(self) -> None:
        if stopping := that_stop(self._config.strict, self.states, self._misfits):
            raise SeamMismatchError(by_name(stopping, self._misfits))

    def _tell(self) -> None:
        # Access is no duty that anybody chooses: it is named where it is missing.
        shown = (*DUTIES, *([] if self.states.get(ACCESS) is State.ON else [ACCESS]))
        told = {name: state.value for name, state in self.states.items() if name in shown}
        told.update(dict.fromkeys(self._loading.duties, _LOADING))
        parts = []
        for state in (State.ON.value, _LOADING, *(s.value for s in State if s is not State.ON)):
            if names := [name for name in shown if told.get(name) == state]:
                parts.append(("" if state == State.ON.value else f"{state}: ") + ", ".join(names))
        process = self._homeserver.instance_name
        logger.info("synapse-sticky runs in %s: %s", process, "; ".join(parts))


def _say_unfit(name: str, problems: list[str], without: str) -> None:
    logger.error(
        "%s is off, as this Synapse does not fit: %s. Without it %s.",
        name,
        "; ".join(problems),
        without,
    )
