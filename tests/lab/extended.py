"""The module in a Synapse whose functions take one more argument, which may be left out.

All functions that the module calls or replaces do. Synapse itself passes it to those that the
module has replaced, so that a replacement that does not hand it on is seen.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

from synapse.module_api import ModuleApi

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import StickyConfig
from synapse_sticky.duties import all_seams
from synapse_sticky.homeserver.fitting import resolve
from synapse_sticky.homeserver.seams import Method

MODULE = f"{__name__}.InExtendedSynapse"
GOT = "got one more argument: "
"""The log says this of each function once, with its name."""

logger = logging.getLogger(__name__)


class InExtendedSynapse(StickyEventsModule):
    """A later Synapse might be like that."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        methods = [seam for seam in all_seams() if isinstance(seam, Method)]
        once = {(seam.owner, seam.name): seam for seam in methods}
        fixed = [str(seam) for seam in once.values() if not _extend(seam)]
        logger.info("%d functions take one more, but for %s", len(once) - len(fixed), fixed)
        super().__init__(config, api)
        replaced = {seam.name for seam in methods if seam.is_replaced}
        for owner in _owners(api._hs):
            for name in replaced & vars(owner).keys():
                setattr(owner, name, _passing_one_more(vars(owner)[name]))


def _owners(hs: Any) -> tuple[Any, ...]:
    """The objects of the homeserver whose methods are replaced."""
    sliding = hs.get_sliding_sync_handler()
    return (
        *(hs.get_datastores().main, hs.get_federation_server(), hs.get_event_creation_handler()),
        *(hs.get_federation_event_handler(), hs.get_sync_handler(), sliding, sliding.extensions),
        hs.get_delayed_events_handler(),
    )


def _extend(seam: Method) -> bool:
    """Has the function take one more, if it is written in Python."""
    owner = resolve(seam.owner)
    holders = owner.__mro__ if inspect.isclass(owner) else (owner,)
    holder = next(holder for holder in holders if seam.name in vars(holder))
    found = vars(holder)[seam.name]
    if isinstance(found, classmethod | staticmethod):
        setattr(holder, seam.name, type(found)(_taking_one_more(found.__func__)))
    elif hasattr(found, "orig"):  # a cached method
        found.orig = _taking_one_more(found.orig)
    elif inspect.isfunction(found):
        extended = _taking_one_more(found)
        setattr(holder, seam.name, extended)
        for module in list(sys.modules.values()):
            if vars(module).get(seam.name) is found:
                setattr(module, seam.name, extended)
    else:
        return False
    return True


def _taking_one_more(original: Callable[..., Any]) -> Callable[..., Any]:
    said: set[object] = set()

    def note(one_more: object) -> None:
        if one_more is not None and not said:
            said.add(one_more)
            logger.info("%s%s", GOT, original.__name__)

    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def asynchronous(*args: Any, one_more: object = None, **options: Any) -> Any:
            note(one_more)
            return await original(*args, **options)

        extended: Callable[..., Any] = asynchronous
    else:

        @functools.wraps(original)
        def synchronous(*args: Any, one_more: object = None, **options: Any) -> Any:
            note(one_more)
            return original(*args, **options)

        extended = synchronous
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    more = inspect.Parameter("one_more", inspect.Parameter.KEYWORD_ONLY, default=None)
    in_order = sorted([*parameters, more], key=lambda parameter: parameter.kind)
    vars(extended)["__signature__"] = signature.replace(parameters=in_order)
    return extended


def _passing_one_more(replacement: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(replacement)
    def call(*args: Any, **options: Any) -> Any:
        return replacement(*args, one_more=True, **options)

    return call
