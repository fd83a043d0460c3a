"""Puts the API together (E3)."""

from typing import TYPE_CHECKING, Protocol

from synapse_sticky.admin.actions import Actions
from synapse_sticky.admin.api import Api, Route
from synapse_sticky.admin.asking import Asking
from synapse_sticky.admin.bounds import Bounds
from synapse_sticky.admin.facts import DeferredTable, Holds, NewcomerTable, ParkedTable, Tables
from synapse_sticky.admin.lists import Lists, OfBoth, OfServers
from synapse_sticky.admin.overview import Counts, Overview
from synapse_sticky.admin.room import DeferredOfRoom, ParkedOfRoom, RoomEvents
from synapse_sticky.admin.why import Why
from synapse_sticky.config import StickyConfig
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.lately import Lately

if TYPE_CHECKING:
    from synapse_sticky.homeserver.rooms import Rooms

BELOW = "admin/v1"
"""The API is there, below the configured path."""


class Deferrals(DeferredTable, Counts, OfBoth, DeferredOfRoom, Protocol):
    """All that is asked of the deferred events."""


class Parkings(ParkedTable, Counts, OfBoth, ParkedOfRoom, Protocol):
    """All that is asked of the parked PDUs."""


class Orders(Holds, Counts, Protocol):
    """All that is asked of what administrators have ordered."""


class Newcomers(NewcomerTable, Counts, OfServers, Protocol):
    """All that is asked of the newcomers."""


def install_admin(homeserver: Homeserver, config: StickyConfig, api: Api) -> None:
    """Has this process answer below the configured path, on its listeners for clients.

    The page has a resource for each file, beside that of the API: Synapse attaches the same ones to
    all listeners, and can do that only if none is below another.

    Raises:
        OSError: a file of the page cannot be read. Then there is no API either.
    """
    from synapse_sticky.admin.listeners.page import page_resources
    from synapse_sticky.admin.listeners.synapse import AdminResource

    path = config.admin.path
    page = list(page_resources(homeserver))
    homeserver.api.register_web_resource(f"{path}/{BELOW}", AdminResource(homeserver, api.answer))
    for name, resource in page:
        homeserver.api.register_web_resource(f"{path}/{name}", resource)


def make_api(
    homeserver: Homeserver,
    config: StickyConfig,
    rooms: "Rooms",
    deferred: Deferrals,
    parked: Parkings,
    newcomers: Newcomers,
    actions: Actions,
    orders: Orders,
    lately: Lately,
) -> Api:
    """Everything that can be asked for."""
    from synapse_sticky.admin.events.synapse import SynapseEvents
    from synapse_sticky.admin.rooms.synapse import SynapseRooms

    tables = Tables(deferred, parked, newcomers, orders)
    events, synapses = SynapseEvents(homeserver), SynapseRooms(homeserver)
    bounds = Bounds.of(config)
    why = Why(Asking(homeserver, rooms, events, tables, bounds))
    of_duties = (deferred, parked, newcomers)
    overview = Overview(homeserver, config.federation, synapses, *of_duties, orders)
    lists = Lists(homeserver, synapses, events, *of_duties, orders, bounds, lately)
    room = RoomEvents(homeserver, events, synapses, deferred, parked)
    return Api(
        [
            Route("GET", "overview", overview.get, is_list=True),
            Route("GET", "events/{event_id}", why.get),
            Route("GET", "rooms", lists.rooms, is_list=True),
            Route("GET", "rooms/{room_id}/events", room.get, is_list=True),
            Route("GET", "servers", lists.servers, is_list=True),
            Route("GET", "actions", actions.get),
            Route("POST", "actions", actions.post),
            Route("DELETE", "actions/{action_id}", actions.delete),
        ]
    )
