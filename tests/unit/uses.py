"""Which private parts of Synapse a file uses that are not declared for it, read off its source.

It knows no types and follows no values. So it cannot see:

- a part that is called as something of Python's own types, of Synapse's public classes, or of what
  the file or a file that it imports defines: such a name is taken for theirs;
- whose attribute it is: what is declared for the file may be used on anything in it;
- a name that is put together, arguments that come as ``*args`` or ``**options``, or an argument
  that is missing;
- what is asked for with a default, as the file goes on without it;
- for which of its parts (``file:part``) a file that declares several uses a name.
"""

import ast
import importlib
import io
import logging
import re
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from inspect import BoundArguments, Parameter, Signature
from pathlib import Path
from typing import Any

import attr
from packaging.version import Version
from prometheus_client import Counter
from synapse.module_api import (
    EventBase,
    LoggingTransaction,
    ModuleApi,
    Requester,
    RoomID,
    SynapseRequest,
    UserID,
)
from synapse.module_api.callbacks.federation import FederationEventDeliveryEvent
from synapse.module_api.errors import ConfigError, SynapseError
from twisted.internet.defer import Deferred, DeferredSemaphore

from synapse_sticky.duties import ALL, DUTIES, seams_of
from synapse_sticky.homeserver.seams import PUBLIC_MODULES, Method, Seam, Table
from tests.unit.test_boundaries import PACKAGE, ROOT, imports, may_touch_synapse, sources

_DESCRIBES = {f"{PACKAGE}/homeserver/{name}.py" for name in ("seams", "fitting")}
"""Looks at descriptions of Synapse, and uses nothing of it."""

_SQL_TABLE = re.compile(r"\b(?:FROM|JOIN|INTO|UPDATE)\s+([a-z0-9_]+)\b(?!\()")
_NO_TABLE_OF_SYNAPSE = ("synapse_sticky_", "pg_", "sqlite_")
_PUBLIC = (
    *(EventBase, LoggingTransaction, ModuleApi, Requester, RoomID, UserID, Deferred),
    *(DeferredSemaphore, SynapseRequest),
    *(FederationEventDeliveryEvent, ConfigError, SynapseError(400, "")),
)
_PYTHONS = (
    *(str, bytes, int, float, list, dict, set, frozenset, tuple, type, Exception, object),
    *(
        logging.Logger,
        BoundArguments,
        Parameter,
        Signature,
        Version,
        OrderedDict,
        Counter,
        sqlite3,
        Path,
        threading.Event,
        threading.Thread,
        io.BytesIO,
    ),
)
_BY_NAME = {"getattr": 2, "setattr": 3, "delattr": 2, "replace": 3, "replace_shared": 3}
"""Functions whose second argument is the name of a part, with how many they take without a
default."""


def _annotations(part: object) -> Iterable[str]:
    return getattr(part, "__annotations__", {})


_OF_OTHERS = {name for part in (*_PUBLIC, *_PYTHONS) for name in (*dir(part), *_annotations(part))}


def sources_of_synapse() -> list[str]:
    """The files that may use private parts of Synapse."""
    found = [path for path in sources(PACKAGE) if may_touch_synapse(path)]
    return sorted({*found} - _DESCRIBES)


# What a file may use


@attr.s(auto_attribs=True, frozen=True)
class Allowed:
    """What a file may use.

    seams: what is declared for it.
    own: the names that it or a file of this package that it imports defines.
    """

    seams: tuple[Seam, ...]
    own: frozenset[str]

    def imports(self, owner: str, name: str) -> bool:
        """Is it declared, or something of it?"""
        return self.has(owner, name) or any(s.owner == f"{owner}.{name}" for s in self.seams)

    def has(self, owner: str, name: str) -> bool:
        return any((seam.owner, seam.name) == (owner, name) for seam in self.seams)

    def has_table(self, name: str) -> bool:
        is_own = name.startswith(_NO_TABLE_OF_SYNAPSE)
        return is_own or any(isinstance(s, Table) and s.name == name for s in self.seams)

    def has_name(self, name: str) -> bool:
        if name in self.own | _OF_OTHERS or "synapse_sticky" in name:
            return True
        return any(seam.name == name for seam in self.seams)

    def calls(self, name: str) -> list[Method]:
        return [seam for seam in self.seams if isinstance(seam, Method) and seam.name == name]


def allowed(path: str) -> Allowed:
    """The seams of the file itself, of the files of ``homeserver`` that it imports, and of what
    every duty needs; and what all of the duties have that use the file."""
    file = path.removeprefix(f"{PACKAGE}/").removesuffix(".py").replace("/", ".")
    seams = [*_declared_in(f"{PACKAGE}.{file}"), *(s for part in ALL for s in seams_of(part))]
    for _, module, _ in imports(path, ast.parse((ROOT / path).read_text())):
        if module.startswith(f"{PACKAGE}.homeserver."):
            seams += _declared_in(module)
    users = [
        duty.seams()
        for duty in DUTIES.values()
        if file in {f.split(":")[0] for part in duty.parts for f in part.files}
    ]
    if users:
        in_all = set.intersection(*({(s.owner, s.name) for s in of_user} for of_user in users))
        seams += [s for of_user in users for s in of_user if (s.owner, s.name) in in_all]
    own = {name for part in ALL for name in _defined_at(f"{PACKAGE}.{part}")}
    return Allowed(tuple(seams), frozenset({*own, *_own_names(path)}))


def _declared_in(module: str) -> list[Seam]:
    declared: Any = getattr(importlib.import_module(module), "SEAMS", ())
    parts = declared.values() if isinstance(declared, Mapping) else [declared]
    return [seam for part in parts for seam in part]


def _own_names(path: str) -> Iterator[str]:
    tree = ast.parse((ROOT / path).read_text())
    yield from _defined_in(tree)
    for _, module, names in imports(path, tree):
        if module.split(".")[0] != PACKAGE:
            continue
        for target in (module, *(f"{module}.{name}" for name in names)):
            yield from _defined_at(target)
            package = Path(target.replace(".", "/")) / "__init__.py"
            if (ROOT / package).exists() and target != PACKAGE:
                yield from _own_names(str(package))


def _defined_at(module: str) -> Iterator[str]:
    stem = ROOT / module.replace(".", "/")
    for file in (stem.with_suffix(".py"), stem.with_suffix(".pyi")):
        if file.exists():
            yield from _defined_in(ast.parse(file.read_text()))


def _defined_in(tree: ast.AST) -> Iterator[str]:
    """Functions, classes, fields, and attributes that are set on ``self``."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name, body=body):
                yield name
                for part in body:
                    if isinstance(part, ast.Assign):
                        yield from (t.id for t in part.targets if isinstance(t, ast.Name))
            case ast.Attribute(attr=name, value=ast.Name(id="self"), ctx=ast.Store()):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case _:
                pass


# What it uses


@attr.s(auto_attribs=True, frozen=True)
class Use:
    """A use that is not declared.

    kind: ``attribute``, ``name`` (in ``getattr`` and the like), ``table``, ``call``, ``original``
        (the call of what is replaced), or ``import`` (a part of a name that is imported).
    """

    kind: str
    line: int
    what: str


def is_private(path: str) -> bool:
    """Is it a part of Synapse that is not of its interface to modules?"""
    return path.partition(".")[0] == "synapse" and not any(
        path == public or path.startswith(f"{public}.") for public in PUBLIC_MODULES
    )


def undeclared(source: str, allowed: Allowed) -> list[Use]:
    """What the source uses that is not allowed."""
    return [*_Reader(ast.parse(source), allowed).uses()]


class _Reader:
    def __init__(self, tree: ast.AST, allowed: Allowed) -> None:
        self._tree = tree
        self._allowed = allowed
        self._imported = dict(_imported(tree))
        self._at_load = {id(node) for node in _at_load(tree)}

    def uses(self) -> Iterator[Use]:
        for node in _at_run_time(self._tree):
            for kind, what in self._in(node):
                yield Use(kind, getattr(node, "lineno", 0), what)

    def _in(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        match node:
            case ast.Attribute(value=ast.Name(id="self")):
                pass
            case ast.Attribute():
                yield from self._in_attribute(node)
            case ast.Constant(value=str(text)):
                for name in _SQL_TABLE.findall(text):
                    if not self._allowed.has_table(name):
                        yield "table", name
            case ast.Call():
                yield from self._by_name(node)
                yield from self._in_call(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from self._in_replacement(node)
            case ast.ImportFrom(module=str(owner), names=names) if id(
                node
            ) not in self._at_load and is_private(owner):
                for alias in names:
                    if not self._allowed.imports(owner, alias.name):
                        yield "import", f"{owner}.{alias.name}"
            case _:
                pass

    def _in_attribute(self, node: ast.Attribute) -> Iterator[tuple[str, str]]:
        origin = self._origin(node.value)
        if origin is None:
            if not self._allowed.has_name(node.attr):
                yield "attribute", ast.unparse(node)
            return
        # Without what it reads when it is loaded, the file cannot be.
        if not is_private(origin) or id(node) in self._at_load or node.attr in _OF_OTHERS:
            return
        if not self._allowed.has(origin, node.attr):
            yield "import", f"{origin}.{node.attr}"

    def _by_name(self, call: ast.Call) -> Iterator[tuple[str, str]]:
        match call:
            case ast.Call(
                func=ast.Name(id=function) | ast.Attribute(attr=function),
                args=[_, ast.Constant(value=str(name)), *_] as arguments,
            ) if _BY_NAME.get(function) == len(arguments) and not self._allowed.has_name(name):
                yield "name", ast.unparse(call)
            case _:
                pass

    def _in_call(self, call: ast.Call) -> Iterator[tuple[str, str]]:
        origin = self._origin(call.func)
        calls: list[Method] = []
        if id(call) in self._at_load:
            return
        if origin is not None and is_private(origin):
            owner, _, name = origin.rpartition(".")
            calls = [seam for seam in self._allowed.calls(name) if seam.owner == owner]
            # A class is called with what its instances have; attrs leaves out the underscore.
            names = [keyword.arg for keyword in call.keywords if keyword.arg]
            if not calls and not all(
                self._allowed.has(origin, name) or self._allowed.has(origin, f"_{name}")
                for name in names
            ):
                yield "import", ast.unparse(call)
        elif origin is None and isinstance(call.func, ast.Attribute):
            name = call.func.attr
            if name not in self._allowed.own | _OF_OTHERS:
                calls = self._allowed.calls(name)
        if calls and not _fits(call.args, call, calls):
            yield "call", ast.unparse(call)

    def _in_replacement(
        self, function: ast.FunctionDef | ast.AsyncFunctionDef
    ) -> Iterator[tuple[str, str]]:
        calls = [seam for seam in self._allowed.calls(function.name) if seam.is_replaced]
        first = function.args.args[0].arg if function.args.args else ""
        # What is replaced for a whole class is called with the object.
        has_self = bool(calls) and first not in (*calls[0].arguments, *calls[0].keywords)
        for node in ast.walk(function) if calls else ():
            match node:
                case ast.Call(func=ast.Name(id="original"), args=arguments) if not _fits(
                    arguments[has_self:], node, calls
                ):
                    yield "original", ast.unparse(node)
                case _:
                    pass

    def _origin(self, node: ast.expr) -> str | None:
        """Where a dotted name comes from that begins with an imported one."""
        match node:
            case ast.Name(id=name):
                return self._imported.get(name)
            case ast.Attribute(value=value, attr=name):
                origin = self._origin(value)
                return origin and f"{origin}.{name}"
            case _:
                return None


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each name that is imported, and the dotted path of what it is."""
    for node in _at_run_time(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from ((a.asname or a.name, f"{module}.{a.name}") for a in names)
            case ast.Import(names=names):
                for alias in names:
                    package = alias.name.partition(".")[0]
                    yield (alias.asname, alias.name) if alias.asname else (package, package)
            case _:
                pass


def _fits(arguments: list[ast.expr], call: ast.Call, seams: list[Method]) -> bool:
    """Is the call, with these arguments by position, declared by any of the seams?"""
    by_position = len([a for a in arguments if not isinstance(a, ast.Starred)])
    by_name = {keyword.arg for keyword in call.keywords if keyword.arg}
    return any(
        by_position <= len((*seam.by_position, *seam.arguments))
        and by_name <= {*seam.arguments, *seam.keywords}
        for seam in seams
    )


def _at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from _at_run_time(node)


def _at_load(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are run when the file is loaded."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from _at_load(node)
