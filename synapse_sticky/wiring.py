"""Which duty runs in which process, and what becomes of one that this Synapse does not fit."""

import logging
from collections.abc import Callable

from synapse.module_api import ModuleApi
from synapse.module_api.errors import ConfigError

from synapse_sticky import metrics
from synapse_sticky.config import LISTED_TWICE, LocalMode, Mode, StickyConfig, Strict
from synapse_sticky.duties import DUTIES, Duty, State, shared_misfits
from synapse_sticky.handlers.deferral.handler import DeferralHandler
from synapse_sticky.handlers.deferral.observer import Observer
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.delivery.handler import DeliveryHandler
from synapse_sticky.handlers.extremities.handler import ExtremitiesHandler
from synapse_sticky.handlers.joins.handler import JoinsHandler
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.handlers.receipt.handler import ReceiptHandler
from synapse_sticky.handlers.sending.handler import SendingHandler
from synapse_sticky.handlers.sliding.handler import SlidingHandler
from synapse_sticky.handlers.sliding.tables import PageTable
from synapse_sticky.handlers.staging.parking.handler import ParkingHandler
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.handlers.staging.pruning.handler import PruningHandler
from synapse_sticky.handlers.staging.turns.handler import TurnsHandler
from synapse_sticky.handlers.visibility.handler import VisibilityHandler
from synapse_sticky.homeserver import Homeserver, database
from synapse_sticky.homeserver.access import Access
from synapse_sticky.homeserver.database import read_columns
from synapse_sticky.homeserver.fitting import misfits
from synapse_sticky.homeserver.seams import SeamMismatchError
from synapse_sticky.index import IndexFollower
from synapse_sticky.limits import LimitReport
from synapse_sticky.loading import Loading
from synapse_sticky.plan import (
    ACCESS,
    TABLES,
    WITHOUT_ACCESS,
    by_name,
    decide,
    guarded,
    is_done_in,
    that_stop,
)

logger = logging.getLogger(__name__)

_LOADED = "_synapse_sticky_is_loaded"

# Files named ``synapse.py`` are imported where they are used: one that the running Synapse does not
# fit is nobody else's business.


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
        self._made_follower: IndexFollower | None = None
        if problems := shared_misfits():
            self._all_unfit(problems)
            return
        self._homeserver = Homeserver(api)
        self._report = LimitReport(self._homeserver.now_ms)
        if hasattr(self._homeserver.store, _LOADED):
            raise ConfigError(LISTED_TWICE)
        self._homeserver.enter(self._homeserver.store, _LOADED, True)
        self._deferred = DeferredTable(self._homeserver)
        self._loading = Loading(self._homeserver, self._set)
        self._columns = read_columns(self._homeserver.hs.config)
        if self._columns is None:
            self._misfits[TABLES] = misfits(database.SEAMS)
        try:
            for duty in DUTIES.values():
                self._begin(duty)
            self._begin_access()
            self._raise_if_strict()
        except Exception:
            self._homeserver.close()
            raise
        self._tell()
        self._loading.begin()

    def _all_unfit(self, problems: list[str]) -> None:
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
        state, problems = decision.state, decision.misfits
        if state is State.ON and (problems := self._install(duty.name)):
            state = State.UNFIT
        if problems:
            self._say_unfit(duty.name, problems, duty.without)
        self._set(duty.name, state)
        if state is State.ON:
            for part in duty.parts:
                lacking = decision.parts.get(part.name) or self._install(part.name)
                if lacking:
                    self._say_unfit(part.name, lacking, part.without)
                self._set(part.name, State.UNFIT if lacking else State.ON)

    def _install(self, duty: str) -> list[str]:
        """Installs it; or leaves no trace of it, and says why."""
        mark = self._homeserver.mark()
        install: Callable[[], None] = getattr(self, f"_install_{duty}")
        try:
            install()
        except Exception as e:
            self._homeserver.undo_to(mark)
            self._loading.duties.pop(duty, None)
            if duty == "index":
                # What others use is another one, which has the database answer.
                self._made_follower = None
            logger.debug("Could not install %s", duty, exc_info=True)
            return [f"{type(e).__name__}: {e}"]
        return []

    def _begin_access(self) -> None:
        """Guards the sections, unless they are left to Synapse."""
        if not is_done_in(ACCESS, self._homeserver.place):
            return
        guard = Access(self._homeserver)
        names = guarded(self.states)
        guards = [guard.guard(name) for name in names]
        problems = [problem for _, found in guards for problem in found]
        if not all(is_guarded for is_guarded, _ in guards):
            self._say_unfit(ACCESS, problems, WITHOUT_ACCESS)
            self._set(ACCESS, State.UNFIT)
            return
        self._misfits[ACCESS] = problems
        self._set(ACCESS, State.ON if names else State.OFF)

    def _say_unfit(self, name: str, problems: list[str], without: str) -> None:
        self._misfits[name] = problems
        logger.error(
            "%s is off, as this Synapse does not fit: %s. Without it %s.",
            name,
            "; ".join(problems),
            without,
        )

    def _set(self, name: str, state: State) -> None:
        self.states[name] = state
        metrics.set_duty(name, state.value)

    def _raise_if_strict(self) -> None:
        if stopping := that_stop(self._config.strict, self.states, self._misfits):
            raise SeamMismatchError(by_name(stopping, self._misfits))

    def _tell(self) -> None:
        # Access and parts are nothing that anybody chooses: they are named where they are missing.
        others = [ACCESS, *(part.name for duty in DUTIES.values() for part in duty.parts)]
        shown = (*DUTIES, *(name for name in others if self.states.get(name) is not State.ON))
        parts = []
        for state in State:
            if names := [name for name in shown if self.states.get(name) is state]:
                of_state = "" if state is State.ON else f"{state.value}: "
                parts.append(of_state + ", ".join(names))
        logger.info(
            "synapse-sticky runs in %s: %s", self._homeserver.instance_name, "; ".join(parts)
        )

    # Installing

    def _install_index(self) -> None:
        self._follower.start()

    @property
    def _follower(self) -> IndexFollower:
        """The index of this process; nobody fills it while the duty of that name is not on."""
        if self._made_follower is None:
            from synapse_sticky.index.synapse import SynapseStickyStream

            stream = SynapseStickyStream(self._homeserver)
            self._made_follower = IndexFollower(self._homeserver, stream)
        return self._made_follower

    def _install_delivery(self) -> None:
        from synapse_sticky.handlers.delivery.synapse import SynapseDelivery

        delivery = SynapseDelivery(self._homeserver)
        DeliveryHandler(self._follower, delivery).install()

    def _install_sliding(self) -> None:
        from synapse_sticky.handlers.sliding.synapse import SynapseSliding

        homeserver = self._homeserver
        sliding = SlidingHandler(homeserver, SynapseSliding(homeserver), PageTable(homeserver))
        sliding.install()
        self._loading.duties["sliding"] = sliding.load

    def _install_visibility(self) -> None:
        from synapse_sticky.handlers.visibility.synapse import SynapseVisibility
        from synapse_sticky.homeserver.rooms import Rooms

        homeserver, config = self._homeserver, self._config.visibility
        visibility = SynapseVisibility(homeserver)
        VisibilityHandler(
            homeserver, Rooms(homeserver), self._follower, visibility, config
        ).install()

    def _install_joins(self) -> None:
        from synapse_sticky.handlers.joins.confirmation.synapse import SynapseAsking
        from synapse_sticky.handlers.joins.detection.synapse import SynapseStateChanges
        from synapse_sticky.handlers.joins.synapse import SynapseFederation
        from synapse_sticky.homeserver.rooms import Rooms

        homeserver = self._homeserver
        rooms = Rooms(homeserver)
        federation = SynapseFederation(homeserver, rooms)
        joins = JoinsHandler(
            homeserver,
            rooms,
            self._follower,
            federation,
            SynapseAsking(homeserver),
            SynapseStateChanges(homeserver),
            NewcomerTable(homeserver),
            self._config.joins,
        )
        joins.install()
        self._loading.duties["joins"] = joins.load

    def _install_pruning(self) -> None:
        from synapse_sticky.handlers.staging.pruning.synapse import SynapsePruning

        self._pruning = SynapsePruning(self._homeserver)
        PruningHandler(self._homeserver, self._pruning).install()

    def _install_turns(self) -> None:
        from synapse_sticky.handlers.staging.turns.synapse import SynapseTurns

        turns = TurnsHandler(self._homeserver, SynapseTurns(self._homeserver))
        turns.install()
        self._pruning.prune_only_if(turns.may_prune)

    def _install_parking(self) -> None:
        from synapse_sticky.handlers.staging.batches.synapse import Batches
        from synapse_sticky.handlers.staging.parking.synapse import SynapseStaging
        from synapse_sticky.homeserver.rooms import Rooms

        homeserver = self._homeserver
        staging, table = SynapseStaging(homeserver), ParkedTable(homeserver)
        parking = ParkingHandler(homeserver, Rooms(homeserver), staging, table)
        parking.install()
        Batches(homeserver, staging.verdict_of).install()
        self._loading.duties["parking"] = parking.load

    def _install_receipt(self) -> None:
        from synapse_sticky.handlers.receipt.synapse import SynapseReceipt

        homeserver, config = self._homeserver, self._config.federation
        receipt = SynapseReceipt(homeserver)
        ReceiptHandler(homeserver, receipt, self._deferred, config, self._report).install()

    def _install_deferral(self) -> None:
        from synapse_sticky.handlers.deferral.synapse import SynapseWriter

        homeserver, config = self._homeserver, self._config.federation
        writer = SynapseWriter(homeserver)
        stream = self._follower.stream
        deferral = DeferralHandler(
            homeserver, writer, self._deferred, stream, config.applied(), self._report
        )
        # Without limits, too: events may be deferred from when there were some.
        deferral.install()
        self._loading.duties["deferral"] = deferral.load
        if config.mode is Mode.OBSERVE:
            report = LimitReport(homeserver.now_ms, observes=True)
            Observer(homeserver, writer, stream, config, report).install()

    def _install_sending(self) -> None:
        from synapse_sticky.handlers.sending.synapse import SynapseSending

        homeserver, config = self._homeserver, self._config
        sending = SynapseSending(homeserver)
        sending.check_parameter()
        if config.state_events:
            sending.accept_sticky_state()
        local = config.local
        if local.per_user is not None and local.mode is not LocalMode.OFF:
            report = LimitReport(homeserver.now_ms, observes=local.mode is LocalMode.OBSERVE)
            SendingHandler(homeserver, sending, local, report).install()

    def _install_extremities(self) -> None:
        from synapse_sticky.handlers.extremities.synapse import SynapseExtremities

        extremities = SynapseExtremities(self._homeserver)
        config = self._config.extremities
        ExtremitiesHandler(self._homeserver, extremities, self._follower, config).install()
