"""The module in a Synapse that is not as it should be: for tests of the start only."""

import functools
import inspect
from typing import Any, ClassVar

import attr
from synapse.module_api import ModuleApi
from synapse.storage.databases.main import DataStore

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import StickyConfig
from synapse_sticky.duties import ALL, DUTIES, seams_of
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
        original = store.insert_sticky_events_txn

        def insert_sticky_events_txn(self: Any, *args: Any) -> None:
            original(self, *args)

        changed: Any = insert_sticky_events_txn
        changed.__signature__ = inspect.signature(lambda self, txn: None)
        store.insert_sticky_events_txn = changed
        super().__init__(config, api)


class InExtendedSynapse(StickyEventsModule):
    """A later Synapse might take one more argument, which may be left out."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        store: Any = DataStore
        original = store.insert_sticky_events_txn

        def insert_sticky_events_txn(self: Any, txn: Any, events: Any, more: bool = False) -> None:
            original(self, txn, events)

        store.insert_sticky_events_txn = insert_sticky_events_txn
        super().__init__(config, api)


# A Synapse in which whatever one duty alone uses takes other arguments.


def only_of(name: str) -> list[Method]:
    """The functions that this duty uses and no other, beside those that need it. Where there is
    none: those that it replaces."""
    others = {(s.owner, s.name) for file in ALL for s in seams_of(file)}
    others |= {(s.owner, s.name) for layer in access.SEAMS.values() for s in layer}
    for duty in DUTIES.values():
        if duty.name != name and name not in duty.needs:
            others |= {(s.owner, s.name) for s in duty.seams()}
    used = [s for s in DUTIES[name].seams() if isinstance(s, Method)]
    only = [s for s in used if (s.owner, s.name) not in others]
    return only or [s for s in used if s.is_replaced]


def duties_unfit_with(name: str) -> set[str]:
    """The duties that use any of these."""
    changed = {(s.owner, s.name) for s in only_of(name)}
    return {
        duty.name for duty in DUTIES.values() if changed & {(s.owner, s.name) for s in duty.seams()}
    }


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


class _InSynapseThatDoesNotFit(StickyEventsModule):
    duty: ClassVar[str]

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        for seam in only_of(self.duty):
            take_others(seam)
        super().__init__(config, api)


def unfit_for(duty: str) -> str:
    """The dotted path of the module in a Synapse that does not fit this duty."""
    return f"{__name__}.UnfitFor{duty.capitalize()}"


globals().update(
    {
        f"UnfitFor{duty.capitalize()}": type("Unfit", (_InSynapseThatDoesNotFit,), {"duty": duty})
        for duty in DUTIES
    }
)


class InSynapseWithoutTurns(StickyEventsModule):
    """What one part of a duty needs takes other arguments."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        (turns,) = DUTIES["pruning"].parts
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
