"""Seams: a private part of Synapse that does not fit is named, and none is used undeclared (H5)."""

import ast
import importlib
import inspect
import logging
import re
import sqlite3
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import pytest
from prometheus_client import Counter
from synapse.module_api import EventBase, LoggingTransaction, ModuleApi, Requester, UserID
from synapse.module_api.callbacks.federation import FederationEventDeliveryEvent
from synapse.module_api.errors import ConfigError
from twisted.internet.defer import Deferred

from synapse_sticky.duties import all_seams as declared
from synapse_sticky.homeserver.seams import (
    Attribute,
    Method,
    Seam,
    SeamMismatchError,
    Table,
    misfits,
)
from tests.unit.test_boundaries import PACKAGE, ROOT, SYNAPSE_ALLOWED, may_touch_synapse, sources

MOST_SEAMS = 201


class Base:
    def __init__(self) -> None:
        self.set_in_base = 5


class Owner(Base):
    constant = 5
    annotated: int

    def __init__(self) -> None:
        super().__init__()
        self.set_at_start = 5

    def method(self, first: int, second: int = 2, *, third: int = 3) -> int:
        return first + second + third

    async def asynchronous(self) -> None: ...

    @cached_property
    def orig(self) -> int:
        return 5


OWNER = f"{__name__}.Owner"


@pytest.mark.parametrize(
    "seam",
    [
        Method(OWNER, "method", 1),
        Method(OWNER, "method", 2, ("third",)),
        Method(OWNER, "method", 0, ("first", "third")),
        Method(OWNER, "method", 1, is_async=False),
        Method(OWNER, "method", 2, names=("first", "second")),
        Method(OWNER, "asynchronous", is_async=True),
        Method(__name__, "sources_of_synapse"),
        Attribute(OWNER, "constant"),
        Attribute(OWNER, "annotated"),
        Attribute(OWNER, "set_at_start"),
        Attribute(OWNER, "set_in_base"),
        Attribute(__name__, "OWNER"),
    ],
)
def test_a_seam_that_fits(seam: Seam) -> None:
    assert misfits([seam]) == []


@pytest.mark.parametrize(
    ("seam", "problem"),
    [
        (Method(OWNER, "gone"), r"Owner\.gone is not there"),
        (Method(OWNER, "constant"), r"Owner\.constant is not a function"),
        (Method(OWNER, "method"), r"Owner\.method takes \(self, first.*missing .*'first'"),
        (Method(OWNER, "method", 3), r"Owner\.method takes .*too many positional arguments"),
        (Method(OWNER, "method", 1, ("fourth",)), r"unexpected keyword argument 'fourth'"),
        (Method(OWNER, "method", 1, is_async=True), r"Owner\.method is no coroutine function"),
        (Method(OWNER, "asynchronous", is_async=False), r"asynchronous is a coroutine function"),
        (Method(OWNER, "method", 1, names=("second",)), r"and not first second"),
        (Method(OWNER, "method", 2, names=("second", "first")), r"and not first second, first"),
        (Method("builtins", "getattr", 2), r"getattr cannot be looked into"),
        (Attribute(OWNER, "gone"), r"Owner\.gone is not there"),
        (Attribute(f"{__name__}.Gone", "any"), r"Gone is not there"),
        (Attribute("synapse.no_such_module.Gone", "any"), r"no_such_module\.Gone is not there"),
        (Attribute("no_such_package", "any"), r"no_such_package is not there"),
    ],
)
def test_a_seam_that_does_not(seam: Seam, problem: str) -> None:
    (found,) = misfits([seam])
    assert re.search(problem, found)
    error = SeamMismatchError([found])
    assert isinstance(error, ConfigError)
    assert found in str(error)
    assert "take the module out of `modules:`" in error.msg


def test_all_seams_fit_this_synapse() -> None:
    assert misfits(declared()) == []


# What is used, read off the source.

_SQL_TABLE = re.compile(r"\b(?:FROM|JOIN|INTO|UPDATE)\s+([a-z0-9_]+)\b(?!\()")
_PUBLIC = (
    *(EventBase, LoggingTransaction, ModuleApi, Requester, UserID, Deferred),
    FederationEventDeliveryEvent,
)
_BUILTIN = (
    *(str, bytes, int, float, list, dict, set, frozenset, tuple, type, Exception, object),
    *(logging.Logger, inspect.Signature, OrderedDict, Counter, sqlite3),
)


def sources_of_synapse() -> list[str]:
    """The files that may use private parts of Synapse."""
    return [path for path in sources(PACKAGE) if may_touch_synapse(path)]


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from run_time_nodes(node)


def imported(path: str) -> Iterator[tuple[str, str, str]]:
    """Module, name, and what the name is called here, of each plain import of a private part."""
    for node in run_time_nodes(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "synapse":
            if node.module in SYNAPSE_ALLOWED:
                continue
            for alias in node.names:
                yield str(node.module), alias.name, alias.asname or alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "synapse":
                    yield alias.name, "", alias.asname or alias.name


def own_names() -> set[str]:
    """What this package itself defines or sets: functions, classes, attributes, arguments."""
    names = set()
    for path in sources(PACKAGE):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    names.add(name)
                case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
                case ast.Attribute(attr=name, value=ast.Name(id="self"), ctx=ast.Store()):
                    names.add(name)
                case ast.AnnAssign(target=ast.Name(id=name)):
                    names.add(name)
                case _:
                    pass
    core = ast.parse((ROOT / PACKAGE / "_core.pyi").read_text())
    names |= {node.name for node in ast.walk(core) if isinstance(node, ast.FunctionDef)}
    return names


def known_names() -> set[str]:
    """What an attribute may be called without being a seam."""
    return own_names() | {
        name for cls in (*_PUBLIC, *_BUILTIN) for name in (*dir(cls), *_annotations(cls))
    }


def _annotations(cls: object) -> Iterable[str]:
    return getattr(cls, "__annotations__", {})


def root_of(node: ast.expr) -> str | None:
    """``a`` of ``a.b.c``; None if it begins with anything but a name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def undeclared(path: str, source: str, known: set[str]) -> Iterator[str]:
    """Attributes and tables of the source that are nobody's, as far as can be seen."""
    tree = ast.parse(source)
    names_of_modules = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    names = {seam.name for seam in declared()}
    tables = {seam.name for seam in declared() if isinstance(seam, Table)}
    for node in run_time_nodes(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self")):
                pass
            case ast.Attribute(attr=name) if root_of(node) not in names_of_modules:
                if name not in known | names and "synapse_sticky" not in name:
                    yield f"{path}:{node.lineno}: {ast.unparse(node)}"
            case ast.Constant(value=str(text)):
                for name in _SQL_TABLE.findall(text):
                    if name not in tables and not name.startswith("synapse_sticky_"):
                        yield f"{path}:{node.lineno}: table {name}"
            case _:
                pass


@pytest.fixture(scope="module")
def known() -> set[str]:
    return known_names()


@pytest.mark.parametrize("path", sources_of_synapse())
def test_every_use_of_synapse_is_declared(path: str, known: set[str]) -> None:
    assert list(undeclared(path, (ROOT / path).read_text(), known)) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f(hs):\n    return hs.get_some_handler()",
        "def f(hs):\n    hs.some_attribute = 5",
        "def f(txn):\n    txn.execute('SELECT 1 FROM presence_stream')",
        "def f(txn):\n    txn.execute('DELETE FROM e2e_room_keys WHERE room_id = ?')",
    ],
)
def test_an_undeclared_use_is_found(source: str, known: set[str]) -> None:
    assert len(list(undeclared("synapse_sticky/index/synapse.py", source, known))) == 1


def test_every_declaration_is_used() -> None:
    texts = " ".join((ROOT / path).read_text() for path in sources_of_synapse())
    for seam in declared():
        used = len(re.findall(rf"\b{re.escape(seam.name)}\b", texts))
        assert used >= 2, f"{seam} is declared and nowhere used"


def test_an_import_is_of_something_there() -> None:
    for path in sources_of_synapse():
        for module, name, _ in imported(path):
            there: Any = importlib.import_module(module)
            assert not name or hasattr(there, name) or f"{module}.{name}" in sys.modules


def all_seams() -> set[tuple[str, str]]:
    """Each private part of Synapse that is imported, called, read or replaced, and each table."""
    parts = {(seam.owner, seam.name) for seam in declared()}
    for path in sources_of_synapse():
        parts |= {(module, name) for module, name, _ in imported(path)}
    return parts


def test_their_number_does_not_grow_by_itself() -> None:
    assert len(all_seams()) <= MOST_SEAMS, "\n".join(sorted(map(".".join, all_seams())))
