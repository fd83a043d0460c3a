"""Seams: every private part of Synapse that the module uses, declared beside its use.

A file that uses private parts of Synapse declares them in its ``SEAMS``. A plain import of a
private name is a seam by itself: it is declared by the import. ``misfits`` checks declarations
without an instance of anything, so before anything is installed. What is read is Synapse's classes
and their source.
"""

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

import attr
from synapse.module_api.errors import ConfigError

HOMESERVER = "synapse.server.HomeServer"
STORE = "synapse.storage.databases.main.DataStore"
"""The main data store, ``hs.get_datastores().main``."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Seam:
    """A private part of Synapse.

    owner: the dotted path of a class or a module.
    name: the attribute's name.
    """

    owner: str
    name: str


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Method(Seam):
    """A function or method, by the call as the module makes it or passes it on.

    positional: how many arguments are passed by position (without self).
    keywords: the names of those that are passed by name.
    is_async: whether the result has to be awaited; None if that does not matter.
    is_replaced: whether the module puts a function of its own in its place.
    names: of the first arguments, where the module's function has them and Synapse's own callers
        may use them: the same, in the same order.
    """

    positional: int = 0
    keywords: tuple[str, ...] = ()
    is_async: bool | None = None
    is_replaced: bool = False
    names: tuple[str, ...] = ()


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Attribute(Seam):
    """An attribute of a class, or one that its instances get."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Table(Seam):
    """A table that the module's own SQL reads or writes; ``owner`` is always ``database``.

    columns: the names of those that the SQL names.
    """

    columns: tuple[str, ...] = ()


def table(name: str, *columns: str) -> Table:
    """A table of Synapse's database, and the columns that the module's SQL names."""
    return Table("database", name, columns)


def attributes(owner: str, *names: str) -> tuple[Attribute, ...]:
    """Several attributes of one owner."""
    return tuple(Attribute(owner, name) for name in names)


class SeamMismatchError(ConfigError):
    """A private part of Synapse is not what this version of the module knows."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(
            f"synapse-sticky does not fit Synapse {version('matrix-synapse')}:"
            f" {'; '.join(problems)}. "
            "Install a version of synapse-sticky that supports this Synapse, or take the module "
            "out of `modules:` until there is one."
        )
        self.args = (self.msg,)  # else str() shows the arguments of this constructor


def misfits(seams: Iterable[Seam]) -> list[str]:
    """What of these seams the running Synapse does not have, one line each."""
    return [problem for seam in seams if (problem := _problem(seam))]


def _problem(seam: Seam) -> str | None:
    if isinstance(seam, Table):
        return None  # columns are looked up in the database
    try:
        owner = resolve(seam.owner)
    except (ImportError, AttributeError) as e:
        return f"{seam.owner} is not there ({e})"
    if isinstance(seam, Method):
        problem = _problem_of_method(owner, seam)
    else:
        problem = None if _has_attribute(owner, seam.name) else "is not there"
    return problem and f"{seam.owner}.{seam.name} {problem}"


def resolve(path: str) -> Any:
    """The module or class of this dotted path.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such class.
    """
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as e:
            if length == 1 or (not path.startswith(f"{e.name}.") and e.name != path):
                raise
            continue
        return functools.reduce(getattr, parts[length:], found)
    raise ImportError(path)


def _problem_of_method(owner: Any, seam: Method) -> str | None:
    try:
        found = inspect.getattr_static(owner, seam.name)
    except AttributeError:
        return "is not there"
    # Synapse's cached methods are descriptors around the function.
    function = getattr(found, "orig", found)
    takes_self = inspect.isclass(owner) and not isinstance(function, staticmethod)
    function = getattr(function, "__func__", function)
    if not callable(function):
        return "is not a function"
    if problem := _problem_of_call(function, seam, takes_self=takes_self):
        return problem
    if seam.is_async is not None and found is function:
        is_async = inspect.iscoroutinefunction(inspect.unwrap(function))
        if is_async != seam.is_async:
            return "is a coroutine function" if is_async else "is no coroutine function"
    return None


def _problem_of_call(function: Any, seam: Method, *, takes_self: bool) -> str | None:
    try:
        signature = inspect.signature(function)
    except ValueError as e:
        return f"cannot be looked into: {e}"
    arguments = [None] * (seam.positional + takes_self)
    try:
        signature.bind(*arguments, **dict.fromkeys(seam.keywords))
    except TypeError as e:
        return f"takes {signature}: {e}"
    names = [name for name in signature.parameters if name != "self"]
    if tuple(names[: len(seam.names)]) != seam.names:
        return f"takes {signature}, and not first {', '.join(seam.names)}"
    return None


def _has_attribute(owner: Any, name: str) -> bool:
    if not inspect.isclass(owner):
        return hasattr(owner, name)
    return any(name in _names_of(cls) for cls in owner.__mro__)


def _sections(cls: type) -> Iterator[str]:
    """The sections of Synapse's configuration, which its root gets from its classes."""
    return (config.section for config in getattr(cls, "config_classes", ()))


@functools.cache
def _names_of(cls: type) -> frozenset[str]:
    """The attributes of the class, and those that its methods set on an instance."""
    annotations = getattr(cls, "__annotations__", ())
    return frozenset((*vars(cls), *annotations, *_set_in(cls), *_sections(cls)))


def _set_in(cls: type) -> Iterator[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return  # built in, or compiled: it has no source
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name
            case _:
                pass
