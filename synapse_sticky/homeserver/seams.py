"""Seams: every private part of Synapse that the module uses, declared beside its use.

A file that uses private parts of Synapse declares them in its ``SEAMS``. An import of a private
name that loads with the file is declared by itself: ``imports_of`` reads it off the source. One in
a function is not, as only a part of the file may need it: what is used of it is declared.
``fitting`` says which of them the running Synapse lacks.
"""

import ast
import functools
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import attr
from synapse.module_api.errors import ConfigError

from synapse_sticky.versions import synapse_version

HOMESERVER = "synapse.server.HomeServer"
STORE = "synapse.storage.databases.main.DataStore"
"""The main data store, ``hs.get_datastores().main``."""

DATABASE = "database"
"""The owner of each table."""

PUBLIC_MODULES = ("synapse.module_api",)
"""What is below these is the public module API."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Seam:
    """A private part of Synapse.

    owner: the dotted path of a class or a module.
    name: the attribute's name.
    """

    owner: str
    name: str

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


@attr.s(auto_attribs=True, frozen=True, slots=True, str=False)
class Method(Seam):
    """A function or method, by the call as the module makes it.

    Of one that the module replaces, only the arguments that the module's own function uses are
    named: that passes on all others.

    by_position: the names of the arguments that are passed by position (without self), where only
        the position matters.
    arguments: the names of those after them that may be passed either way.
    keywords: the names of those that are passed by name.
    is_async: whether the result has to be awaited.
    is_replaced: whether the module puts a function of its own in its place.
    returns: the annotation of the result; only its shape is compared. None if it does not matter.
    """

    by_position: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    is_async: bool = False
    is_replaced: bool = False
    returns: str | None = None


@attr.s(auto_attribs=True, frozen=True, slots=True, str=False)
class Attribute(Seam):
    """An attribute of a class, or one that its instances get."""


@attr.s(auto_attribs=True, frozen=True, slots=True, str=False)
class Import(Seam):
    """A name that is imported from a module; the module itself if ``name`` is empty."""


@attr.s(auto_attribs=True, frozen=True, slots=True, str=False)
class Table(Seam):
    """A table that the module's own SQL reads or writes; ``owner`` is always ``DATABASE``.

    columns: the name of each column that the SQL names, and the kind of its values.
    """

    columns: tuple[tuple[str, str], ...] = ()


def method(owner: str, signature: str, *, is_replaced: bool = False) -> Method:
    """A function or method, its call written as Python writes a signature.

    For instance ``"async get_events(event_ids, /, *, allow_rejected) -> dict"``.
    """
    is_async = signature.startswith("async ")
    function: Any = ast.parse(f"def {signature.removeprefix('async ')}: ...").body[0]
    arguments = function.args
    return Method(
        owner,
        function.name,
        tuple(argument.arg for argument in arguments.posonlyargs),
        tuple(argument.arg for argument in arguments.args),
        tuple(argument.arg for argument in arguments.kwonlyargs),
        is_async=is_async,
        is_replaced=is_replaced,
        returns=function.returns and ast.unparse(function.returns),
    )


def table(name: str, columns: str) -> Table:
    """A table of Synapse's database, and the columns that the module's SQL names.

    For instance ``table("rooms", "room_id text")``.
    """
    named = [column.split() for column in columns.split(",")]
    return Table(DATABASE, name, tuple((column, kind) for column, kind in named))


def attributes(owner: str, *names: str) -> tuple[Attribute, ...]:
    """Several attributes of one owner."""
    return tuple(Attribute(owner, name) for name in names)


@functools.cache
def imports_of(module: ModuleType) -> tuple[Import, ...]:
    """The private names of Synapse that a module imports as it is loaded."""
    return tuple(imports_in(ast.parse(inspect.getsource(module))))


def imports_in(tree: ast.AST) -> Iterator[Import]:
    """The same, for its syntax tree. What is for type checkers only is left out."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                continue
            case ast.ImportFrom(module=str(path), names=names) if _is_private(path):
                yield from (Import(path, alias.name) for alias in names)
            case ast.Import(names=names):
                yield from (Import(alias.name, "") for alias in names if _is_private(alias.name))
            case _:
                yield from imports_in(node)


def _is_private(path: str) -> bool:
    return path.split(".", maxsplit=1)[0] == "synapse" and not any(
        path == public or path.startswith(f"{public}.") for public in PUBLIC_MODULES
    )


class SeamMismatchError(ConfigError):
    """A private part of Synapse is not what this version of the module knows."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(
            f"synapse-sticky does not fit Synapse {synapse_version()}:"
            f" {'; '.join(problems)}. "
            "Install a version of synapse-sticky that supports this Synapse, or take the module "
            "out of `modules:` until there is one."
        )
        self.args = (self.msg,)  # else str() shows the arguments of this constructor
