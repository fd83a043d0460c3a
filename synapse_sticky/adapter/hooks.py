"""Checked access to Synapse's private parts.

Each hook names its owner, its attribute and the parameters that it counts on. One that does not
fit stops the start, rather than doing something else than it should.
"""

import inspect
from collections.abc import Callable
from typing import Any

from synapse.module_api.errors import ConfigError
from synapse.util import SYNAPSE_VERSION


class HookMismatchError(ConfigError):
    """A private part of Synapse is not what this version of the module knows."""

    def __init__(self, owner: object, name: str, problem: str) -> None:
        super().__init__(
            f"synapse-sticky does not fit {SYNAPSE_VERSION}: {_name(owner)}.{name} {problem}. "
            "Install a version of synapse-sticky that supports this Synapse, or take the module "
            "out of `modules:` until there is one."
        )
        self.args = (self.msg,)  # else str() shows the arguments of this constructor


def _name(owner: object) -> str:
    if inspect.ismodule(owner):
        return owner.__name__
    kind = owner if inspect.isclass(owner) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}"


def attribute(owner: object, name: str) -> Any:
    """The attribute, or HookMismatchError if there is none."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise HookMismatchError(owner, name, "is not there") from None


def method(owner: object, name: str, *parameters: str) -> Callable[..., Any]:
    """The callable, if it takes exactly these parameters (without self), else HookMismatchError."""
    function = attribute(owner, name)
    if not callable(function):
        raise HookMismatchError(owner, name, "is not a function")
    found = tuple(p for p in inspect.signature(function).parameters if p != "self")
    if found != parameters:
        raise HookMismatchError(
            owner, name, f"takes ({', '.join(found)}) instead of ({', '.join(parameters)})"
        )
    return function


def replace(owner: object, name: str, *parameters: str) -> Callable[[Callable[..., Any]], None]:
    """Checks a method and gives the function that sets another in its place."""
    method(owner, name, *parameters)
    return lambda replacement: setattr(owner, name, replacement)
