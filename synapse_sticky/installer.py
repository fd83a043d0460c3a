"""Makes the duties of this process, each of its own parts and of what they share."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from synapse_sticky.admin.following import Following
from synapse_sticky.admin.tables import ActionTable
from synapse_sticky.config import LocalMode, Mode, StickyConfig
from synapse_sticky.handlers.deferral.handler import DeferralHandler
from synapse_sticky.handlers.deferral.observer import Observer
from synapse_sticky.handlers.deferral.reading import DeferredReader
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.delivery.handler import DeliveryHandler
from synapse_sticky.handlers.delivery.ttl.handler import TtlHandler
from synapse_sticky.handlers.delivery.unignored.handler import Unignored
from synapse_sticky.handlers.delivery.unignored.tables import UnignoredTable
from synapse_sticky.handlers.extremities.handler import ExtremitiesHandler
from synapse_sticky.handlers.joins.handler import JoinsHandler
from synapse_sticky.handlers.joins.reading import NewcomerReader
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.handlers.joins.whitelist.whitelist import Whitelist
from synapse_sticky.handlers.receipt.handler import ReceiptHandler
from synapse_sticky.handlers.sending.handler import SendingHandler
from synapse_sticky.handlers.sliding.handler import SlidingHandler
from synapse_sticky.handlers.sliding.tables import PageTable
from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.parking.handler import ParkingHandler
from synapse_sticky.handlers.staging.parking.reading import ParkedReader
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.handlers.staging.pruning.handler import PruningHandler
from synapse_sticky.handlers.staging.received.handler import ReceivedHandler
from synapse_sticky.handlers.staging.turns.handler import TurnsHandler
from synapse_sticky.handlers.visibility.handler import VisibilityHandler
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.received import Received
from synapse_sticky.index import EventsOfSenders, IndexFollower
from synapse_sticky.index.gone import GoneRows
from synapse_sticky.lately import Lately
from synapse_sticky.limits import LimitReport
from synapse_sticky.loading import Loading
from synapse_sticky.orders import Orders

if TYPE_CHECKING:
    from synapse_sticky.handlers.staging.pruning.synapse import SynapsePruning
    from synapse_sticky.handlers.staging.turns.synapse import SynapseTurns

logger = logging.getLogger(__name__)

# Files named ``synapse.py`` are imported where they are used: one that the running Synapse does not
# fit is nobody else's business.


class Installer:
    """Makes and installs parts of duties.

    Args:
        loading: is told how to load the duties that have tables.
    """

    def __init__(self, homeserver: Homeserver, config: StickyConfig, loading: Loading) -> None:
        self._homeserver = homeserver
        self._config = config
        self._loading = loading
        self._lately = Lately(homeserver.now_ms)
        metrics = homeserver.metrics
        self._report = LimitReport(homeserver.steady_ms, metrics.limits, self._lately)
        self._observes = LimitReport(homeserver.steady_ms, metrics.observed)
        self._deferred = DeferredTable(homeserver)
        self._parked = ParkedTable(homeserver)
        self._orders = Orders()
        self._actions = ActionTable(homeserver)
        self._following = Following(homeserver, self._actions, self._orders)
        self._held = Held()
        self._received = Received(homeserver)
        self._made_follower: IndexFollower | None = None
        self._unignored: Unignored | None = None
        self._pruning: SynapsePruning | None = None
        self._turns: SynapseTurns | None = None

    def install(self, duty: str, part: str) -> list[str]:
        """Installs a part of a duty; or leaves no trace of that, and says why."""
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

    def _install_index(self) -> None:
        self.follower.start()
        GoneRows(self._homeserver, self.follower.stream).install()

    @property
    def follower(self) -> IndexFollower:
        """The index of this process; nobody fills it while the duty of that name is not on."""
        if self._made_follower is None:
            from synapse_sticky.index.synapse import SynapseStickyStream

            stream = SynapseStickyStream(self._homeserver)
            self._made_follower = IndexFollower(self._homeserver, stream)
        return self._made_follower

    def _follow_orders(self) -> None:
        """Has what administrators order be in force here. Nothing is without the API."""
        if self._config.admin.enabled:
            self._homeserver.in_background("follow_orders", self._following.begin)

    def _install_delivery(self) -> None:
        from synapse_sticky.handlers.delivery.synapse import SynapseDelivery

        delivery = SynapseDelivery(self._homeserver)
        DeliveryHandler(self._homeserver, self.follower, delivery).install()

    def _install_delivery_ttl(self) -> None:
        from synapse_sticky.handlers.delivery.ttl.synapse import SynapseTelling

        TtlHandler(self.follower, SynapseTelling(self._homeserver)).install()

    def _install_delivery_unignored(self) -> None:
        from synapse_sticky.handlers.delivery.unignored.synapse import SynapseIgnoring

        homeserver = self._homeserver
        parts = (SynapseIgnoring(homeserver), UnignoredTable(homeserver))
        events = EventsOfSenders(homeserver, self.follower)
        unignored = Unignored(homeserver, *parts, events.find)
        unignored.install(serves_clients=homeserver.place.serves("client"))
        self._unignored = unignored

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
        parts = (Rooms(hs), self.follower, SynapseVisibility(hs), Retention(hs))
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
            self.follower,
            federation,
            SynapseAsking(homeserver),
            SynapseStateChanges(homeserver),
            table,
            self._config.joins,
            self._orders,
            self._actions.done,
        )
        joins.install()
        self._follow_orders()

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
        self._turns = SynapseTurns(homeserver, held)
        turns = TurnsHandler(homeserver, self._turns, held)
        turns.install()
        if self._pruning is not None:
            self._pruning.prune_by(turns.take_prunable)

    def _install_parking(self) -> None:
        from synapse_sticky.handlers.staging.batches.synapse import Batches
        from synapse_sticky.handlers.staging.parking.origins.synapse import SynapseOrigins
        from synapse_sticky.handlers.staging.parking.synapse import SynapseStaging
        from synapse_sticky.homeserver.rooms import Rooms

        homeserver, held = self._homeserver, self._held
        staging, table = SynapseStaging(homeserver, held, self._received), self._parked
        rooms, origins, stream = (
            Rooms(homeserver),
            SynapseOrigins(homeserver),
            self.follower.stream,
        )
        parking = ParkingHandler(homeserver, rooms, staging, origins, table, held, stream)
        parking.install()
        Batches(homeserver, staging.verdict_of).install()
        self._loading.duties["parking"] = parking.load

    def _install_parking_received(self) -> None:
        from synapse_sticky.handlers.staging.received.synapse import SynapseReceiving

        # After parking, and so around it: parking knows by then when a PDU was received.
        homeserver, received = self._homeserver, self._received
        parts = (SynapseReceiving(homeserver, received), received, self._parked)
        handler = ReceivedHandler(homeserver, *parts)
        handler.install()
        if self._turns is not None:
            self._turns.tell_chosen(handler.note_chosen_txn)

    def _install_parking_first_joins(self) -> None:
        from synapse_sticky.handlers.staging.first_joins.synapse import FirstJoins

        FirstJoins(self._homeserver).install()

    def _install_receipt(self) -> None:
        from synapse_sticky.handlers.receipt.synapse import SynapseReceipt

        homeserver, config = self._homeserver, self._config.federation
        receipt = SynapseReceipt(homeserver)
        deferred, report, orders = self._deferred, self._report, self._orders
        ReceiptHandler(homeserver, receipt, deferred, config, report, orders).install()
        self._lately.recorded.add("refused")
        self._follow_orders()

    def _install_deferral(self) -> None:
        from synapse_sticky.handlers.deferral.synapse import SynapseWriter

        homeserver, config = self._homeserver, self._config.federation
        writer = SynapseWriter(homeserver, self._received)
        stream, orders = self.follower.stream, self._orders
        deferral = DeferralHandler(
            homeserver, writer, self._deferred, stream, config.applied(), self._report, orders
        )
        # Without limits, too: events may be deferred from when there were some.
        deferral.install()
        self._follow_orders()

        async def load() -> None:
            # What is held is not released meanwhile.
            if self._config.admin.enabled:
                await self._following.begin()
            await deferral.load()

        self._loading.duties["deferral"] = load
        if config.applied().mode is not Mode.OFF:
            self._lately.recorded.add("deferred")
        if config.mode is Mode.OBSERVE:
            Observer(homeserver, writer, stream, config, self._observes).install()

    def _install_sending_limit(self) -> None:
        from synapse_sticky.handlers.sending.synapse import SynapseSending

        homeserver, local = self._homeserver, self._config.local
        report = self._observes if local.mode is LocalMode.OBSERVE else self._report
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
        ExtremitiesHandler(self._homeserver, extremities, self.follower, config).install()

    def _install_admin(self) -> None:
        from synapse_sticky.admin.actions import Actions
        from synapse_sticky.admin.installing import install_admin, make_api
        from synapse_sticky.homeserver.rooms import Rooms

        homeserver, config = self._homeserver, self._config
        rooms = Rooms(homeserver)
        deferred = DeferredReader(homeserver, config.federation)
        readers = deferred, ParkedReader(), NewcomerReader(homeserver)
        actions = Actions(
            *(homeserver, rooms, self._actions, config.federation, self._following.look),
            duties=[duty for duty in ("deferral", "joins") if config.is_on(duty)],
        )
        api = make_api(*(homeserver, config, rooms, *readers, actions, self._actions, self._lately))
        install_admin(homeserver, config, api)
