"""The module in a Synapse that is not as it should be: for tests of the start only."""

import functools
import inspect
from typing import Any, ClassVar

import attr
from synapse.module_api import ModuleApi
from synapse.storage.databases.main import DataStore

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import StickyConfig
from synapse_sticky.duties import DUTIES
from synapse_sticky.homeserver import access, process
from synapse_sticky.homeserver.fitting import resolve
from synapse_sticky.homeserver.seams import STORE, Attribute, Method, Seam, table


class InOlderSynapse(StickyEventsModule):
    """A Synapse before 1.163."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        vars(process)["synapse_version"] = lambda: "1.162.0"
        super().__init__(config, api)


class InChangedSynapse(StickyEventsModule):
    """A later Synapse, whose own calls fit it, might have another signature."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        store: Any = DataStore
        original = store.un_soft_fail_sticky_events_txn

        def un_soft_fail_sticky_events_txn(self: Any, *args: Any) -> None:
            original(self, *args)

        changed: Any = un_soft_fail_sticky_events_txn
        changed.__signature__ = inspect.signature(lambda self, txn: None)
        store.un_soft_fail_sticky_events_txn = changed
        super().__init__(config, api)


def take_others(seam: Method) -> None:
    """Changes what the function says that it takes, if that can be. Synapse's calls go on."""
    owner = resolve(seam.owner)
    for holder in owner.__mro__ if inspect.isclass(owner) else [owner]:
        original = vars(holder).get(seam.name)
        if inspect.isfunction(original):
            break
    else:
        return  # cached, built in, or a method of the class itself
    parameters = list(inspect.signature(original).parameters.values())
    if seam.is_replaced:
        # What takes its place would pass on one more.
        used = {*seam.by_position, *seam.arguments, *seam.keywords}
        parameters = [
            p.replace(name=f"other_{p.name}") if p.name in used else p for p in parameters
        ]
    else:
        parameters.append(inspect.Parameter("another_one", inspect.Parameter.KEYWORD_ONLY))
    changed = _like(original)
    changed.__signature__ = inspect.Signature(sorted(parameters, key=lambda p: p.kind))
    setattr(holder, seam.name, changed)


def _like(original: Any) -> Any:
    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def asynchronous(*args: Any, **options: Any) -> Any:
            return await original(*args, **options)

        return asynchronous

    @functools.wraps(original)
    def synchronous(*args: Any, **options: Any) -> Any:
        return original(*args, **options)

    return synchronous


class InSynapseWithoutTurns(StickyEventsModule):
    """What one part of a duty needs takes other arguments."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        (turns,) = (part for part in DUTIES["pruning"].parts if part.name == "turns")
        for seam in turns.seams():
            if isinstance(seam, Method) and seam.is_replaced:
                take_others(seam)
        super().__init__(config, api)


class InSynapseWithItsOwn(StickyEventsModule):
    """A later Synapse may do some of this itself: known by an attribute, a table or an option."""

    MARKS: ClassVar[dict[str, Seam]] = {
        "sliding": Attribute("synapse.handlers.sync.SyncHandler", "wait_for_sync_for_user"),
        "joins": Attribute(STORE, "get_sticky_events_in_rooms"),
        "pruning": table("federation_inbound_events_staging", "event_json text"),
        "parking": table("events", "event_id text"),
        "deferral": Attribute("synapse.config.ratelimiting.RatelimitConfig", "rc_message"),
        "sending": Attribute("synapse.config.ratelimiting.RatelimitConfig", "rc_message"),
        # Not this one: it has no such table yet.
        "receipt": table("sticky_events_of_receipt", "event_id text"),
    }

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        duties: Any = DUTIES
        for name, mark in self.MARKS.items():
            duties[name] = attr.evolve(duties[name], native=mark)
        super().__init__(config, api)


class InSynapseThatNobodyGuards(StickyEventsModule):
    """Both layers on which the sections of /sync are guarded have changed."""

    LAYERS: ClassVar[tuple[str, ...]] = ("sync_section", "sync_response")

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        for layer in self.LAYERS:
            for seam in access.SEAMS[layer]:
                if isinstance(seam, Method) and seam.is_replaced:
                    take_others(seam)
        super().__init__(config, api)


class InSynapseWithOneLayer(InSynapseThatNobodyGuards):
    """One of them has changed."""

    LAYERS = ("sync_response",)
