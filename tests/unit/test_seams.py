"""Seams: a private part of Synapse that does not fit is named (H5)."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, NamedTuple

import pytest
from synapse.module_api.errors import ConfigError

from synapse_sticky.duties import all_seams as declared
from synapse_sticky.homeserver.fitting import misfits
from synapse_sticky.homeserver.seams import (
    Attribute,
    Import,
    Seam,
    SeamMismatchError,
    method,
    table,
)


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

        def later() -> None:
            self.set_later, self.annotated = 5, 5

        self.later = later

    @property
    def read(self) -> int:
        return getattr(self, "gone", 0) or self.never_set  # type: ignore[attr-defined]

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


def of_a_module() -> None: ...


class Surprising(type):
    def __getattr__(cls, name: str) -> object:
        raise RuntimeError(f"{name} is asked for")


class Surprise(metaclass=Surprising):
    @cached_property
    def orig(self) -> int:
        return 5


exec(  # noqa: S102
    "class WithoutSource:\n    def __init__(self): self.set_at_start = 5",
    globals(),
)
WITHOUT_SOURCE = f"{__name__}.WithoutSource"
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
        method(__name__, "of_a_module()"),
        Attribute(OWNER, "constant"),
        Attribute(OWNER, "annotated"),
        Attribute(OWNER, "set_at_start"),
        Attribute(OWNER, "set_in_base"),
        Attribute(OWNER, "set_later"),
        Attribute(WITHOUT_SOURCE, "set_at_start"),
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
        (Attribute(OWNER, "never_set"), r"Owner\.never_set is not there"),
        (Attribute(WITHOUT_SOURCE, "gone"), r"WithoutSource\.gone is not there"),
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
