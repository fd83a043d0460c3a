"""Calls of what stands in the place of one of Synapse's functions."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMELESS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_IS_ASYNC = "is_async_for_synapse_sticky"


def in_place_of(
    original: Callable[..., Any], replacement: Callable[..., Any]
) -> Callable[..., Any]:
    """The replacement, which may be called in each way that the original may; with the name and the
    signature of that.

    The replacement gets each argument by its name, however it was passed. An argument that both
    have by position has the replacement's name for it; all others have the original's name. Of
    those that are left out, the replacement gets the original's default if it knows the name.

    Args:
        original: takes no argument by position only.
        replacement: names each argument that it looks at, and may pass on all others. In the place
            of a coroutine function it may be a plain one that gives something to await: with
            nothing of its own to do, what the original gives. That costs one call, where a
            coroutine costs one more each time that the original goes on.
    """
    signature = inspect.signature(original)
    parameters = signature.parameters.values()
    if any(parameter.kind in _NAMELESS for parameter in parameters):
        # Somebody else's replacement, which passes on what comes.
        return _as_original(replacement, original, signature)
    own = inspect.signature(replacement).parameters
    is_alike = _is_async(original) or not inspect.iscoroutinefunction(replacement)
    if (
        inspect.isfunction(replacement)
        and is_alike
        and _takes_the_same(list(own.values()), list(parameters))
    ):
        # Every sync and every event comes by some of these: nothing is between.
        return _as_original(replacement, original, signature)
    own_names = dict(
        zip(
            (parameter.name for parameter in parameters if parameter.kind in _BY_POSITION),
            (name for name, parameter in own.items() if parameter.kind in _BY_POSITION),
            strict=False,
        )
    )
    # What it does not know goes on to the original, which knows its own default best.
    defaults = {
        name: parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty
        and (name := own_names.get(parameter.name, parameter.name)) in own
    }
    rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), "")
    known = {p.name: own_names.get(p.name, p.name) for p in parameters if p.name != rest}
    in_order = [known[p.name] for p in parameters if p.kind in _BY_POSITION]
    required = frozenset(known[p.name] for p in parameters if p.name in known and not _is_left(p))

    def by_name(*args: Any, **options: Any) -> dict[str, Any]:
        # Several of these stand in the way of each event, and ``bind`` takes microseconds. It is
        # for what is not plain here, as for a call that the original does not take.
        if len(args) <= len(in_order):
            given = dict(zip(in_order, args, strict=False))
            for name, value in options.items():
                if (own_name := known.get(name)) is None or own_name in given:
                    break
                given[own_name] = value
            else:
                if given.keys() >= required:
                    return {**defaults, **given}
        arguments = signature.bind(*args, **options).arguments
        unnamed = arguments.pop(rest, {})
        named = {own_names.get(name, name): value for name, value in arguments.items()}
        return {**defaults, **named, **unnamed}

    def call(*args: Any, **options: Any) -> Any:
        return replacement(**by_name(*args, **options))

    return _as_original(call, original, signature)


def _takes_the_same(own: list[inspect.Parameter], others: list[inspect.Parameter]) -> bool:
    """May the first be called in each way that the others may, to the same effect? It may take
    more. It may also name the first arguments only, if it passes on all others as they come."""
    named = [_key(parameter) for parameter in own if parameter.kind not in _REST]
    expected = [_key(parameter) for parameter in others]
    if named == expected:
        return True
    passes_on = tuple(parameter.kind for parameter in own if parameter.kind in _REST) == _REST
    return (
        passes_on
        and named
        == [key for key, other in zip(expected, others, strict=True) if other.kind in _BY_POSITION][
            : len(named)
        ]
    )


def _key(parameter: inspect.Parameter) -> tuple[str, Any, Any]:
    return parameter.name, parameter.kind, parameter.default


def _is_left(parameter: inspect.Parameter) -> bool:
    """May it be left out?"""
    return parameter.default is not inspect.Parameter.empty


def _is_async(function: Callable[..., Any]) -> bool:
    """Does it give something to await?"""
    return getattr(function, _IS_ASYNC, False) or inspect.iscoroutinefunction(function)


def _as_original(
    replacement: Callable[..., Any], original: Callable[..., Any], signature: inspect.Signature
) -> Callable[..., Any]:
    """The replacement with the name and this signature. What a method says of itself, which
    ``wraps`` copies, may name the object as well, and the next replacement would believe it."""
    function = functools.wraps(original)(replacement)
    vars(function)["__signature__"] = signature
    vars(function)[_IS_ASYNC] = _is_async(original)
    return function
