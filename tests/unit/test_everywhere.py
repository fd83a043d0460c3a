"""A function of Synapse is replaced wherever modules hold it, or nowhere."""

import gc
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from synapse_sticky.homeserver.everywhere import replace_everywhere
from synapse_sticky.homeserver.seams import SeamMismatchError
from tests.unit.coroutines import result_of

Plant = Callable[..., ModuleType]
IMPORT = "from planted.origin import function"


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Makes a loaded module from its source."""

    def make(name: str, source: str) -> ModuleType:
        module = ModuleType(f"planted.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(source, vars(module))  # noqa: S102  # the test's own source
        return module

    return make


@pytest.fixture
def origin(plant: Plant) -> ModuleType:
    return plant(
        "origin", "async def function(one, two=2):\n    '''Says so.'''\n    return 'plain'"
    )


def with_more(original: Callable[..., Any]) -> Callable[..., Any]:
    async def replacement(*args: Any, **options: Any) -> str:
        return f"more than {await original(*args, **options)}"

    return replacement


def replace(origin: ModuleType, *plain: str) -> None:
    replace_everywhere(origin, {"function": with_more}, plain=plain)


def says(module: ModuleType, name: str = "function") -> str:
    answer: str = result_of(getattr(module, name)(1))
    return answer


MORE = "more than plain"


def test_all_modules_get_it_also_those_that_import_it_later(
    origin: ModuleType, plant: Plant
) -> None:
    early = plant("early", f"{IMPORT}\nfrom planted.origin import function as alias")
    replace(origin)
    late = plant("late", IMPORT)
    assert [says(origin), says(early), says(early, "alias"), says(late)] == [MORE] * 4
    replace(origin)
    assert says(early) == MORE, "once a process"


def test_it_has_the_name_and_the_signature_of_the_original(origin: ModuleType) -> None:
    signature = inspect.signature(origin.function)
    replace(origin)
    assert origin.function.__name__ == "function"
    assert origin.function.__doc__ == "Says so."
    assert inspect.signature(origin.function) == signature
    assert inspect.iscoroutinefunction(origin.function)


def test_what_is_to_stay_plain_does(origin: ModuleType, plant: Plant) -> None:
    plain = plant("plain", IMPORT)
    other = plant("other", IMPORT)
    replace(origin, "planted.plain", "planted.that_cannot_be_imported")
    assert [says(plain), says(other)] == ["plain", MORE]


@pytest.mark.parametrize(
    ("source", "holder"),
    [
        ("import functools\nheld = functools.partial(function)", "partial of planted.holder.held"),
        ("def user(to_call=function): pass", "a tuple of planted.holder.user"),
        ("def user(*, to_call=function): pass", "a dict of planted.holder.user"),
        ("class User:\n    to_call = function", "a dict of planted.holder.User"),
        ("class User:\n    def __init__(self): self.f = function\nuser = User()", "holder.User"),
        (
            "class User:\n    def __init__(self): self.f = function\nu = User()\nvars(u)",
            "holder.User",
        ),
        ("def make(f):\n    return lambda: f\nuser = make(function)", "planted.holder.make"),
        ("all = [function]", "a list of planted.holder.all"),
        ("all = {'one': (function,)}", "a tuple of a dict"),
        ("user = function.__get__(5)", "a method"),
    ],
)
def test_what_holds_it_otherwise_is_named_and_nothing_is_replaced(
    origin: ModuleType, plant: Plant, source: str, holder: str
) -> None:
    early = plant("early", IMPORT)
    plant("holder", f"{IMPORT}\n{source}")
    with pytest.raises(SeamMismatchError) as error:
        replace(origin)
    assert "planted.origin.function is held by" in error.value.msg
    assert holder in error.value.msg
    assert [says(origin), says(early)] == ["plain"] * 2


def test_if_one_of_two_does_not_fit_neither_is_replaced(origin: ModuleType, plant: Plant) -> None:
    exec("async def other(one):\n    return 'plain'", vars(origin))  # noqa: S102
    plant("holder", "from planted.origin import other\nall = [other]")
    with pytest.raises(SeamMismatchError, match=r"origin\.other"):
        replace_everywhere(origin, {"function": with_more, "other": with_more})
    assert says(origin) == "plain"


def test_what_calls_nothing_any_more_does_not_count(origin: ModuleType, plant: Plant) -> None:
    plant("garbage", f"{IMPORT}\nclass User:\n    to_call = function\ndel User")
    under_way = origin.function(1)
    replace(origin)
    assert says(origin) == MORE
    assert result_of(under_way) == "plain"


def test_methods_that_attrs_has_written_have_globals_of_their_own(
    origin: ModuleType, plant: Plant
) -> None:
    user = plant(
        "user", f"import attr\n{IMPORT}\n@attr.s(auto_attribs=True)\nclass User:\n    one: int"
    )
    replace(origin)
    assert says(user) == MORE
    assert user.User(1) == user.User(1)


def test_modules_that_are_frozen(origin: ModuleType, plant: Plant) -> None:
    """As Synapse freezes all there is once it has started."""
    early = plant("early", IMPORT)
    gc.freeze()
    try:
        replace(origin)
    finally:
        gc.unfreeze()
    assert [says(origin), says(early)] == [MORE] * 2
