"""The module's entry: configuration, and which duty runs in which process."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from synapse.module_api import ModuleApi

from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.config import DUTIES, Mode, StickyConfig, parse
from synapse_sticky.handlers.deferral.handler import DeferralHandler
from synapse_sticky.handlers.deferral.synapse import SynapseWriter
from synapse_sticky.handlers.deferral.tables import DeferredTable
from synapse_sticky.handlers.delivery.handler import DeliveryHandler
from synapse_sticky.handlers.delivery.synapse import SynapseDelivery
from synapse_sticky.handlers.extremities.handler import ExtremitiesHandler
from synapse_sticky.handlers.extremities.synapse import SynapseExtremities
from synapse_sticky.handlers.joins.detection.synapse import SynapseStateChanges
from synapse_sticky.handlers.joins.handler import JoinsHandler
from synapse_sticky.handlers.joins.synapse import SynapseFederation
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.handlers.receipt.handler import ReceiptHandler
from synapse_sticky.handlers.receipt.synapse import SynapseReceipt
from synapse_sticky.handlers.sending.handler import SendingHandler
from synapse_sticky.handlers.sending.synapse import SynapseSending
from synapse_sticky.handlers.sliding.handler import SlidingHandler
from synapse_sticky.handlers.sliding.synapse import SynapseSliding
from synapse_sticky.handlers.sliding.tables import PageTable
from synapse_sticky.handlers.staging.parking import ParkingHandler
from synapse_sticky.handlers.staging.pruning import PruningHandler
from synapse_sticky.handlers.staging.synapse import SynapseStaging
from synapse_sticky.handlers.staging.tables import ParkedTable
from synapse_sticky.handlers.visibility.handler import VisibilityHandler
from synapse_sticky.handlers.visibility.synapse import SynapseVisibility
from synapse_sticky.homeserver import Homeserver, Rooms
from synapse_sticky.homeserver.layout import NewerLayoutError
from synapse_sticky.homeserver.seams import SeamMismatchError, misfits
from synapse_sticky.index import IndexFollower
from synapse_sticky.index.synapse import SynapseStickyStream
from synapse_sticky.limits import LimitReport
from synapse_sticky.seam_table import SEAMS

logger = logging.getLogger(__name__)

_LOAD_BACKOFF = Backoff(5_000, 60_000, spread=0)

Load = Callable[[], Awaitable[None]]


class StickyEventsModule:
    """Makes all of MSC4354 work on Synapse >= 1.163.

    Synapse makes one in every process, once its stores and handlers stand and before it listens.

    Raises:
        ConfigError: this Synapse cannot carry the module, or the configuration is wrong.
    """

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        self._homeserver = homeserver = Homeserver(api)
        if problems := misfits(seam for seams in SEAMS.values() for seam in seams):
            raise SeamMismatchError(problems)
        self._config = config
        self._rooms = Rooms(homeserver)
        self._stream = SynapseStickyStream(homeserver)
        self._follower = IndexFollower(homeserver, self._stream)
        self._report = LimitReport(homeserver.now_ms)
        self._duties = ["index"]
        # Duties with tables of their own are loaded once these are there. Until then Synapse does
        # as it does without the module.
        self._loads: dict[str, Load] = {}
        self._install_delivery()
        self._install_visibility()
        self._install_joins()
        self._install_limits()
        self._install_sending()
        self._install_extremities()
        # Last: the PDUs that parking has processed at once are under the limits then.
        self._install_staging()
        self._follower.start()
        if self._loads:
            homeserver.in_background("load", self._load_all)
        names = ", ".join(duty for duty in DUTIES if duty in self._duties)
        logger.info("synapse-sticky runs in %s: %s", homeserver.instance_name, names)

    def _install_delivery(self) -> None:
        homeserver = self._homeserver
        DeliveryHandler(homeserver, self._follower, SynapseDelivery(homeserver)).install()
        sliding = SlidingHandler(homeserver, SynapseSliding(homeserver), PageTable(homeserver))
        sliding.install()
        self._loads["sliding"] = sliding.load
        self._duties += ["delivery", "sliding"]

    def _install_visibility(self) -> None:
        homeserver, config = self._homeserver, self._config.visibility
        if not config.servers and not config.users:
            return
        visibility = SynapseVisibility(homeserver)
        VisibilityHandler(homeserver, self._rooms, self._follower, visibility, config).install()
        self._duties.append("visibility")

    def _install_joins(self) -> None:
        homeserver = self._homeserver
        federation = SynapseFederation(homeserver, self._rooms)
        if not self._config.joins.enabled or not federation.sends:
            return
        joins = JoinsHandler(
            homeserver,
            self._rooms,
            self._follower,
            federation,
            SynapseStateChanges(homeserver),
            NewcomerTable(homeserver),
            self._config.joins,
        )
        joins.install()
        self._loads["joins"] = joins.load
        self._duties.append("joins")

    def _install_staging(self) -> None:
        if not self._config.staging.keep_sticky:
            return
        homeserver = self._homeserver
        staging = SynapseStaging(homeserver)
        PruningHandler(homeserver, staging).install()
        parking = ParkingHandler(homeserver, self._rooms, staging, ParkedTable(homeserver))
        parking.install()
        self._loads["parking"] = parking.load
        self._duties += ["pruning", "parking"]

    def _install_limits(self) -> None:
        homeserver, config = self._homeserver, self._config.federation
        deferred = DeferredTable(homeserver)
        is_limited = config.mode is not Mode.OFF
        writer = SynapseWriter(homeserver)
        if writer.writes:
            # Without limits too: events may be deferred from when there were some.
            deferral = DeferralHandler(
                homeserver, writer, deferred, self._stream, config, self._report
            )
            deferral.install()
            self._loads["deferral"] = deferral.load
            self._duties += ["deferral"] if is_limited else []
        if is_limited and homeserver.serves("federation"):
            receipt = SynapseReceipt(homeserver)
            ReceiptHandler(homeserver, receipt, deferred, config, self._report).install()
            self._duties.append("receipt")

    def _install_sending(self) -> None:
        homeserver, config = self._homeserver, self._config
        if not homeserver.serves("client"):
            return
        sending = SynapseSending(homeserver)
        sending.check_parameter()
        if config.local.per_user is not None:
            SendingHandler(homeserver, sending, config.local, self._report).install()
            self._duties.append("sending")
        if config.state_events:
            sending.accept_sticky_state()

    def _install_extremities(self) -> None:
        homeserver, config = self._homeserver, self._config.dummy_events
        extremities = SynapseExtremities(homeserver)
        if config.enabled and extremities.merges:
            ExtremitiesHandler(homeserver, extremities, self._follower, config).install()
            self._duties.append("extremities")

    async def _load_all(self) -> None:
        """Loads each duty, and each that could not be loaded again until it can."""
        for duty, load in self._loads.items():
            await Retrying(
                self._homeserver,
                f"load_{duty}",
                f"Could not load {duty}",
                lambda duty=duty, load=load: self._load(duty, load),  # type: ignore[misc]
                _LOAD_BACKOFF,
            ).run()

    async def _load(self, duty: str, load: Load) -> None:
        try:
            await load()
        except NewerLayoutError as e:
            # Trying again does not help: the duty stays as it is without the module.
            logger.error("%s is off: %s", duty, e)

    @staticmethod
    def parse_config(config: dict[str, Any]) -> StickyConfig:
        """Checks the module's ``config:``.

        Raises:
            ConfigError: naming the wrong option and what is allowed.
        """
        return parse(config)
