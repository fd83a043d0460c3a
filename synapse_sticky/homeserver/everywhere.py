"""Replacing functions of a module of Synapse that many others have imported by name.

``from synapse.x import function`` copies the reference: whoever did that goes on with the original
if only ``synapse.x`` is changed. So each loaded module's global that holds the original is changed
as well; whoever imports it later gets the replacement from ``synapse.x``.
"""

import functools
import gc
import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from types import CellType, FrameType, FunctionType, ModuleType
from typing import Any

from synapse_sticky.homeserver.calls import in_place_of
from synapse_sticky.homeserver.seams import SeamMismatchError
from synapse_sticky.logs import bounded

logger = bounded(__name__)

Function = Callable[..., Any]
Modules = Mapping[int, tuple[str, dict[str, Any]]]
"""The globals of each loaded module with the module's name, by the ``id`` of the globals."""


def replace_everywhere(
    module: ModuleType,
    makes: Mapping[str, Callable[[Function], Function]],
    *,
    plain: Collection[str] = (),
) -> None:
    """Puts ``makes[name](original)`` in the place of these functions of the module, wherever a
    module holds them; once a process.

    All homeservers of the process share the replacement, and it stays. So it must find what it does
    by an entry on an object of the homeserver (``Homeserver.enter``), and hold no homeserver.

    Args:
        module: where the functions are defined.
        makes: by the functions' names.
        plain: the names of modules that keep the original. They are imported now. One that cannot
            be imported would get the replacement if it could be later.

    Raises:
        SeamMismatchError: something other than a module's global holds an original: a partial, a
            default argument, an attribute. Nothing was replaced.
    """
    originals: dict[str, Function] = {name: getattr(module, name) for name in makes}
    for name in [name for name, function in originals.items() if _is_ours(function)]:
        del originals[name]
    if not originals:
        return
    for name in plain:
        try:
            importlib.import_module(name)
        except ImportError as e:
            logger.debug("%s cannot be imported: %s", name, e)
    modules = _modules()
    holders = {name: _holders(originals, name, modules) for name in originals}
    if any(others for _, others in holders.values()):
        gc.collect()  # garbage calls nothing
        holders = {name: _holders(originals, name, modules) for name in originals}
    if problems := [
        f"{module.__name__}.{name} is held by {other}"
        for name, (_, others) in holders.items()
        for other in others
    ]:
        raise SeamMismatchError(problems)
    for name, (namespaces, _) in holders.items():
        original = originals[name]
        replacement: Any = in_place_of(original, makes[name](original))
        replacement.is_of_synapse_sticky = True
        for namespace in namespaces:
            if namespace.get("__name__") not in plain:
                namespace.update(dict.fromkeys(_names(namespace, original), replacement))


def _is_ours(function: Function) -> bool:
    return getattr(function, "is_of_synapse_sticky", False)


def _modules() -> Modules:
    # Without waking a module that loads itself at its first use, or is a stand-in for another.
    found = [
        (name, object.__getattribute__(module, "__dict__"))
        for name, module in sys.modules.copy().items()
        if issubclass(type(module), ModuleType)
    ]
    return {id(namespace): (name, namespace) for name, namespace in reversed(found)}


def _holders(
    originals: Mapping[str, Function], name: str, modules: Modules
) -> tuple[list[dict[str, Any]], list[str]]:
    """The globals that hold the function of this name, and whatever else does, described.

    Objects that ``gc.freeze`` has put aside are found only if they are the globals of a loaded
    module. Synapse does that once it has started, which is after the modules are made.
    """
    # Nothing but this function's own variables and the mapping may hold the original meanwhile: a
    # comprehension, a generator, or an iterator over the mapping's items would be found.
    original = originals[name]
    code = getattr(original, "__code__", None)
    found = []
    for _, namespace in modules.values():
        if _names(namespace, original):
            found.append(namespace)
    others = []
    for holder in gc.get_referrers(original):
        if holder is originals or id(holder) in modules or isinstance(holder, FrameType):
            continue
        if code is not None and getattr(holder, "cr_code", None) is code:
            continue  # a call of the function that is under way
        if isinstance(holder, dict) and holder.keys() >= {"__name__", "__builtins__"}:
            found.append(holder)  # a copy of a module's globals, for methods that attrs writes
        else:
            others.append(_described(holder, modules))
    return found, others


def _described(holder: object, modules: Modules) -> str:
    """What it is, and where to look for it."""
    description = _label(holder)
    if not isinstance(holder, dict | tuple | list | set | frozenset | CellType | functools.partial):
        return description
    owners = []
    for owner in gc.get_referrers(holder):
        if (module := modules.get(id(owner))) is not None:
            name, namespace = module
            for key in _names(namespace, holder):
                owners.append(f"{name}.{key}")
        elif isinstance(owner, tuple):  # of a closure
            owners += [_label(f) for f in gc.get_referrers(owner) if isinstance(f, FunctionType)]
        elif not isinstance(owner, FrameType | list):
            owners.append(_label(owner))
    return f"{description} of {' and '.join(owners)}" if owners else description


def _names(namespace: Mapping[str, object], value: object) -> list[str]:
    return [name for name, held in namespace.items() if held is value]


def _label(found: object) -> str:
    named = found if isinstance(found, type | FunctionType) else type(found)
    label = f"{named.__module__}.{named.__qualname__}".removeprefix("builtins.")
    return label if named is found else f"a {label}"
