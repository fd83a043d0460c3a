"""Which duty runs in which process, and what becomes of one that this Synapse does not fit."""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from synapse.module_api import ModuleApi
from synapse.module_api.errors import ConfigError

from synapse_sticky import metrics
from synapse_sticky.config import LISTED_TWICE, LocalMode, Mode, StickyConfig, Strict
from synapse_sticky.duties import DUTIES, Duty, State, shared_misfits
from synapse_sticky.handlers.deferral.handler import DeferralHandler
from synapse_sticky.handlers.deferral.observer import Observer
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.delivery.handler import DeliveryHandler
from synapse_sticky.handlers.delivery.ttl.handler import TtlHandler
from synapse_sticky.handlers.extremities.handler import ExtremitiesHandler
from synapse_sticky.handlers.joins.handler import JoinsHandler
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.handlers.joins.whitelist.whitelist import Whitelist
from synapse_sticky.handlers.receipt.handler import ReceiptHandler
from synapse_sticky.handlers.sending.handler import SendingHandler
from synapse_sticky.handlers.sliding.handler import SlidingHandler
from synapse_sticky.handlers.sliding.tables import PageTable
from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.parking.handler import ParkingHandler
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.handlers.staging.pruning.handler import PruningHandler
from synapse_sticky.handlers.staging.received.handler import ReceivedHandler
from synapse_sticky.handlers.staging.turns.handler import TurnsHandler
from synapse_sticky.handlers.visibility.handler import VisibilityHandler
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.access import Access
from synapse_sticky.homeserver.database import read_columns
from synapse_sticky.homeserver.received import Received
from synapse_sticky.homeserver.seams import SeamMismatchError
from synapse_sticky.homeserver.unignored import Unignored
from synapse_sticky.index import EventsOfSenders, IndexFollower
from synapse_sticky.index.gone import GoneRows
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
    of_part,
    that_stop,
)

if TYPE_CHECKING:
    from synapse_sticky.handlers.staging.pruning.synapse import SynapsePruning

logger = logging.getLogger(__name__)

_LOADED = "_synapse_sticky_is_loaded"
_LOADING = "loading"

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
        self._made_unignored: Unignored | None = None
        self._pruning: SynapsePruning | None = None
        if problems := shared_misfits():
            self._all_unfit(problems)
            return
        self._homeserver = Homeserver(api)
        self._report = LimitReport(self._homeserver.steady_ms)
        if hasattr(self._homeserver.store, _LOADED):
            raise ConfigError(LISTED_TWICE)
        self._homeserver.enter(self._homeserver.store, _LOADED, True)
        self._deferred = DeferredTable(self._homeserver)
        self._held = Held()
        self._received = Received(self._homeserver)
        self._loading = Loading(self._homeserver, self._set_loaded)
        self._columns, self._misfits[TABLES] = read_columns(self._homeserver.hs.config)
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
        state = decision.state
        for part, lacks in decision.parts:
            if problems := lacks or self._install(duty.name, part.name):
                state = State.UNFIT
                self._misfits.setdefault(duty.name, []).extend(of_part(part, problems))
                name = f"{duty.name} ({part.name})" if part.name else duty.name
                _say_unfit(name, problems, part.without)
        # One with tables is on once these are there.
        self._set(duty.name, State.OFF if duty.name in self._loading.duties else state)

    def _install(self, duty: str, part: str) -> list[str]:
        """Installs a part of it; or leaves no trace of that, and says why."""
        mark = self._homeserver.mark()
        name = f"_install_{duty}_{part}" if part else f"_install_{duty}"
        install: Callable[[], None] = getattr(self, name)
        try:
            install()
        except Exception as e:
            self._homeserver.undo_to(mark)
            if not part:
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

    def _set(self, name: str, state: State) -> None:
        self.states[name] = state
        metrics.set_duty(name, state.value)

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

    # Installing

    def _install_index(self) -> None:
        self._follower.start()
        GoneRows(self._homeserver, self._follower.stream).install()

    @property
    def _follower(self) -> IndexFollower:
        """The index of this process; nobody fills it while the duty of that name is not on."""
        if self._made_follower is None:
            from synapse_sticky.index.synapse import SynapseStickyStream

            stream = SynapseStickyStream(self._homeserver)
            self._made_follower = IndexFollower(self._homeserver, stream)
        return self._made_follower

    @property
    def _unignored(self) -> Unignored:
        """Whom this process' users ignored before."""
        if self._made_unignored is None:
            events = EventsOfSenders(self._homeserver, self._follower)
            self._made_unignored = Unignored(self._homeserver, events.find)
        return self._made_unignored

    def _install_delivery(self) -> None:
        from synapse_sticky.handlers.delivery.synapse import SynapseDelivery

        delivery = SynapseDelivery(self._homeserver)
        DeliveryHandler(self._follower, delivery).install()
        if self._homeserver.place.serves("client"):
            self._unignored.add_to_sync()

    def _install_delivery_ttl(self) -> None:
        from synapse_sticky.handlers.delivery.ttl.synapse import SynapseTelling

        TtlHandler(self._follower, SynapseTelling(self._homeserver)).install()

    def _install_sliding(self) -> None:
        from synapse_sticky.handlers.sliding.synapse import SynapseSliding

        homeserver = self._homeserver
        sections = SynapseSliding(homeserver, self._unignored)
        sliding = SlidingHandler(homeserver, sections, PageTable(homeserver))
        sliding.install()
        self._loading.duties["sliding"] = sliding.load

    def _install_visibility(self) -> None:
        from synapse_sticky.handlers.visibility.synapse import SynapseVisibility
        from synapse_sticky.homeserver.retention import Retention
        from synapse_sticky.homeserver.rooms import Rooms

        hs, config = self._homeserver, self._config.visibility
        parts = (Rooms(hs), self._follower, SynapseVisibility(hs), Retention(hs))
        VisibilityHandler(hs, *parts, config).install()

    def _install_joins(self) -> None:
        from synapse_sticky.handlers.joins.confirmation.synapse import SynapseAsking
        from synapse_sticky.handlers.joins.detection.synapse import SynapseStateChanges
        from synapse_sticky.handlers.joins.synapse import SynapseFederation
        from synapse_sticky.handlers.joins.whitelist.synapse import SynapseWhitelist
        from synapse_sticky.homeserver.rooms import Rooms

        homeserver = self._homeserver
        rooms = Rooms(homeserver)
        federation, table = SynapseFederation(homeserver, rooms), NewcomerTable(homeserver)
        whitelist = Whitelist(homeserver, SynapseWhitelist(homeserver), federation, table)
        joins = JoinsHandler(
            homeserver,
            rooms,
            self._follower,
            federation,
            SynapseAsking(homeserver),
            SynapseStateChanges(homeserver),
            table,
            self._config.joins,
        )
        joins.install()

        async def load() -> None:
            await joins.load()
            whitelist.begin()

        self._loading.duties["joins"] = load

    def _install_pruning(self) -> None:
        from synapse_sticky.handlers.staging.pruning.synapse import SynapsePruning

        pruning = SynapsePruning(self._homeserver)
        PruningHandler(self._homeserver, pruning).install()
        self._pruning = pruning

    def _install_pruning_turns(self) -> None:
        from synapse_sticky.handlers.staging.turns.synapse import SynapseTurns

        homeserver, held = self._homeserver, self._held
        turns = TurnsHandler(homeserver, SynapseTurns(homeserver, held), held)
        turns.install()
        if self._pruning is not None:
            self._pruning.prune_by(turns.take_prunable)

    def _install_parking(self) -> None:
        from synapse_sticky.handlers.staging.batches.synapse import Batches
        from synapse_sticky.handlers.staging.parking.origins.synapse import SynapseOrigins
        from synapse_sticky.handlers.staging.parking.synapse import SynapseStaging
        from synapse_sticky.homeserver.rooms import Rooms

        homeserver, held = self._homeserver, self._held
        staging, table = SynapseStaging(homeserver, held, self._received), ParkedTable(homeserver)
        rooms, origins, stream = (
            Rooms(homeserver),
            SynapseOrigins(homeserver),
            self._follower.stream,
        )
        parking = ParkingHandler(homeserver, rooms, staging, origins, table, held, stream)
        parking.install()
        Batches(homeserver, staging.verdict_of).install()
        self._loading.duties["parking"] = parking.load

    def _install_parking_received(self) -> None:
        from synapse_sticky.handlers.staging.received.synapse import SynapseReceiving

        # After parking, and so around it: parking knows by then when a PDU was received.
        homeserver, received = self._homeserver, self._received
        parts = (SynapseReceiving(homeserver, received), received, ParkedTable(homeserver))
        ReceivedHandler(homeserver, *parts).install()

    def _install_parking_first_joins(self) -> None:
        from synapse_sticky.handlers.staging.first_joins.synapse import FirstJoins

        FirstJoins(self._homeserver).install()

    def _install_receipt(self) -> None:
        from synapse_sticky.handlers.receipt.synapse import SynapseReceipt

        homeserver, config = self._homeserver, self._config.federation
        receipt = SynapseReceipt(homeserver)
        ReceiptHandler(homeserver, receipt, self._deferred, config, self._report).install()

    def _install_deferral(self) -> None:
        from synapse_sticky.handlers.deferral.synapse import SynapseWriter

        homeserver, config = self._homeserver, self._config.federation
        writer = SynapseWriter(homeserver, self._received)
        stream = self._follower.stream
        deferral = DeferralHandler(
            homeserver, writer, self._deferred, stream, config.applied(), self._report
        )
        # Without limits, too: events may be deferred from when there were some.
        deferral.install()
        self._loading.duties["deferral"] = deferral.load
        if config.mode is Mode.OBSERVE:
            report = LimitReport(homeserver.steady_ms, observes=True)
            Observer(homeserver, writer, stream, config, report).install()

    def _install_sending_limit(self) -> None:
        from synapse_sticky.handlers.sending.synapse import SynapseSending

        homeserver, local = self._homeserver, self._config.local
        report = LimitReport(homeserver.steady_ms, observes=local.mode is LocalMode.OBSERVE)
        SendingHandler(homeserver, SynapseSending(homeserver), local, report).install()

    def _install_sending_parameter(self) -> None:
        from synapse_sticky.handlers.sending.synapse import SynapseSending

        SynapseSending(self._homeserver).check_parameter()

    def _install_sending_state_events(self) -> None:
        from synapse_sticky.handlers.sending.synapse import SynapseSending

        SynapseSending(self._homeserver).accept_sticky_state()

    def _install_extremities(self) -> None:
        from synapse_sticky.handlers.extremities.synapse import SynapseExtremities

        extremities = SynapseExtremities(self._homeserver)
        config = self._config.extremities
        ExtremitiesHandler(self._homeserver, extremities, self._follower, config).install()


def _say_unfit(name: str, problems: list[str], without: str) -> None:
    logger.error(
        "%s is off, as this Synapse does not fit: %s. Without it %s.",
        name,
        "; ".join(problems),
        without,
    )
