"""Seams: a private part of Synapse that does not fit is named, and none is used undeclared (H5)."""

import ast
import inspect
import logging
import re
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, NamedTuple

import pytest
from prometheus_client import Counter
from synapse.module_api import EventBase, LoggingTransaction, ModuleApi, Requester, UserID
from synapse.module_api.callbacks.federation import FederationEventDeliveryEvent
from synapse.module_api.errors import ConfigError
from twisted.internet.defer import Deferred

from synapse_sticky.duties import all_seams as declared
from synapse_sticky.duties import number_of_seams
from synapse_sticky.homeserver.fitting import misfits
from synapse_sticky.homeserver.seams import (
    Attribute,
    Import,
    Seam,
    SeamMismatchError,
    Table,
    imports_in,
    method,
    table,
)
from tests.unit.test_boundaries import PACKAGE, ROOT, may_touch_synapse, sources

MOST_SEAMS = 223


class Counts(OrderedDict[str, int]):
    pass


class Pair(NamedTuple):
    first: int
    second: int


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

    def lookup(self, key: str) -> Mapping[str, int]:
        return {key: 5}

    def pair(self) -> tuple[int, dict[str, int]]:
        return 5, {}

    def perhaps(self) -> "str | None":
        return None

    def of_a_class(self) -> Counts: ...  # type: ignore[empty-body]

    def named(self) -> Pair: ...  # type: ignore[empty-body]

    def strange(self) -> Annotated[str, object()]:
        return ""


class Surprising(type):
    def __getattr__(cls, name: str) -> object:
        raise RuntimeError(f"{name} is asked for")


class Surprise(metaclass=Surprising):
    @cached_property
    def orig(self) -> int:
        return 5


OWNER = f"{__name__}.Owner"
COLUMNS = {"there": {"number": "integer", "word": "text", "truth": "boolean", "raw": "bytes"}}


@pytest.mark.parametrize(
    "seam",
    [
        method(OWNER, "method(first, /) -> int"),
        method(OWNER, "method(one, /, *, third) -> int"),
        method(OWNER, "method(first, second, *, third)"),
        method(OWNER, "method(*, first, third)"),
        method(OWNER, "async asynchronous()"),
        method(OWNER, "lookup(key, /) -> dict"),
        method(OWNER, "lookup(key, /) -> Mapping | None"),
        method(OWNER, "pair() -> tuple[_, _]"),
        method(OWNER, "perhaps() -> str | None"),
        method(OWNER, "of_a_class() -> dict"),
        method(OWNER, "named() -> tuple[_, _]"),
        method(OWNER, "strange() -> str"),
        method(__name__, "sources_of_synapse()"),
        Attribute(OWNER, "constant"),
        Attribute(OWNER, "annotated"),
        Attribute(OWNER, "set_at_start"),
        Attribute(OWNER, "set_in_base"),
        Attribute(__name__, "OWNER"),
        Import("synapse.api.constants", "EventTypes"),
        Import("synapse.visibility", ""),
        Import("synapse", "visibility"),
        table("there", "number integer, word text, truth boolean, raw bytes"),
    ],
    ids=str,
)
def test_a_seam_that_fits(seam: Seam) -> None:
    assert misfits([seam], COLUMNS) == []


@pytest.mark.parametrize(
    ("seam", "problem"),
    [
        (method(OWNER, "gone()"), r"Owner\.gone is not there"),
        (method(OWNER, "constant()"), r"Owner\.constant is not a function"),
        (method(OWNER, "method()"), r"Owner\.method takes \(self, first.*missing .*'first'"),
        (method(OWNER, "method(a, b, c, /)"), r"Owner\.method takes .*too many positional"),
        (method(OWNER, "method(a, /, *, fourth)"), r"unexpected keyword argument 'fourth'"),
        (method(OWNER, "async method(a, /)"), r"Owner\.method is no coroutine function"),
        (method(OWNER, "asynchronous()"), r"asynchronous is a coroutine function"),
        (method(OWNER, "method(second)"), r"and not second"),
        (method(OWNER, "method(second, first)"), r"and not second, first"),
        (method(OWNER, "method(second, first, /)"), r"and not second, first"),
        (method(OWNER, "method(one, two)"), r"and not one, two"),
        (method(OWNER, "method(a, /) -> str"), r"method returns int, not str"),
        (method(OWNER, "lookup(key, /) -> list"), r"lookup returns .*Mapping.*, not list"),
        (method(OWNER, "pair() -> tuple[_, _, _]"), r"pair returns tuple.*, not tuple"),
        (method(OWNER, "of_a_class() -> list"), r"of_a_class returns .*Counts, not list"),
        (method(OWNER, "named() -> tuple[_, _, _]"), r"named returns .*Pair, not tuple"),
        (method(OWNER, "perhaps() -> str"), r"perhaps returns .*str.*None.*, not str"),
        (method("builtins", "getattr(a, b, /)"), r"getattr cannot be looked into"),
        (Attribute(OWNER, "gone"), r"Owner\.gone is not there"),
        (Attribute(f"{__name__}.Gone", "any"), r"Gone is not there"),
        (
            Attribute(f"{__name__}.Surprise.inner", "any"),
            r"inner\.any cannot be looked into: RuntimeError: inner is asked for",
        ),
        (Attribute("synapse.no_such_module.Gone", "any"), r"no_such_module\.Gone is not there"),
        (Attribute("no_such_package", "any"), r"no_such_package is not there"),
        (Import("synapse.api.constants", "Gone"), r"constants\.Gone cannot be imported"),
        (Import("synapse.gone", ""), r"synapse\.gone.* cannot be imported"),
        (table("gone", "number integer"), r"table gone is not there"),
        (table("there", "number integer, gone text"), r"table there has no column gone"),
        (table("there", "word integer"), r"word of table there has values of text, not integer"),
    ],
    ids=str,
)
def test_a_seam_that_does_not(seam: Seam, problem: str) -> None:
    (found,) = misfits([seam], COLUMNS)
    assert re.search(problem, found)
    error = SeamMismatchError([found])
    assert isinstance(error, ConfigError)
    assert found in str(error)
    assert "take the module out of `modules:`" in error.msg


def test_tables_are_not_in_doubt_while_the_columns_are_not_known() -> None:
    assert misfits([table("gone", "number integer")]) == []


def test_all_seams_fit_this_synapse() -> None:
    assert misfits(declared()) == []


# What is used, read off the source.

_SQL_TABLE = re.compile(r"\b(?:FROM|JOIN|INTO|UPDATE)\s+([a-z0-9_]+)\b(?!\()")
_PUBLIC = (
    *(EventBase, LoggingTransaction, ModuleApi, Requester, UserID, Deferred),
    *(FederationEventDeliveryEvent, ConfigError, Path),
)
_BUILTIN = (
    *(str, bytes, int, float, list, dict, set, frozenset, tuple, type, Exception, object),
    *(logging.Logger, inspect.Signature, OrderedDict, Counter, sqlite3),
)


_DESCRIBES = {f"{PACKAGE}/homeserver/{name}.py" for name in ("seams", "fitting")}
"""Looks at descriptions of Synapse, and uses nothing of it."""


def sources_of_synapse() -> list[str]:
    """The files that may use private parts of Synapse."""
    found = [path for path in sources(PACKAGE) if may_touch_synapse(path)]
    return sorted({*found} - _DESCRIBES)


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from run_time_nodes(node)


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
                    if name not in tables and not name.startswith(
                        ("synapse_sticky_", "pg_", "sqlite_")
                    ):
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


def test_every_import_is_found() -> None:
    """Also one of a file that no duty names: it is declared by nobody then."""
    declared_imports = {seam for seam in declared() if isinstance(seam, Import)}
    for path in sources_of_synapse():
        found = set(imports_in(ast.parse((ROOT / path).read_text())))
        assert found <= declared_imports, path
    source = "if TYPE_CHECKING:\n    import synapse.a\ndef f():\n    from synapse.b import c, d"
    assert set(imports_in(ast.parse(source))) == {
        Import("synapse.b", "c"),
        Import("synapse.b", "d"),
    }


def test_their_number_does_not_grow_by_itself() -> None:
    """Each private part of Synapse that is imported, called, read or replaced, and each table."""
    assert number_of_seams() <= MOST_SEAMS, "\n".join(sorted({str(s) for s in declared()}))
