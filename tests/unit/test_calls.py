"""What stands in the place of a function is called in each way that the function may be (H5)."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from synapse_sticky.homeserver.calls import in_place_of

pytestmark = pytest.mark.requirement("H5")

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Synapse:
    """Functions as a Synapse may have them by now; each gives what it got."""

    def all_by_either(self, one: int, two: int, three: int = 3) -> Any:
        return one, two, three

    def last_by_name(self, one: int, two: int, *, three: int = 3) -> Any:
        return one, two, three

    def of_other_names(self, first: int, second: int, three: int = 3) -> Any:
        return first, second, three

    def with_more(self, one: int, two: int, three: int = 3, *, four: int = 0, **rest: int) -> Any:
        return one, two, three, *([four, rest] if four else [])

    def all_have_defaults(self, first: int = 7, two: int = 2, three: int = 8) -> Any:
        return first, two, three

    async def later(self, one: int, two: int, three: int = 3) -> Any:
        return one, two, three


def adding(original: Callable[..., Any]) -> Callable[..., Any]:
    """Uses the first by position, and the third by its name."""

    def replacement(one: int, *args: Any, three: int = 3, **options: Any) -> Any:
        return original(one + 10, *args, three=three + 10, **options)

    async def later(*args: Any, **options: Any) -> Any:
        return await replacement(*args, **options)

    return later if inspect.iscoroutinefunction(original) else replacement


@pytest.mark.parametrize(
    ("name", "call", "expected"),
    [
        ("all_by_either", ((1, 2), {}), (11, 2, 13)),
        ("all_by_either", ((1, 2, 3), {}), (11, 2, 13)),
        ("all_by_either", ((1,), {"three": 4, "two": 2}), (11, 2, 14)),
        ("all_by_either", ((), {"three": 4, "two": 2, "one": 1}), (11, 2, 14)),
        ("last_by_name", ((1, 2), {"three": 4}), (11, 2, 14)),
        ("of_other_names", ((1, 2, 3), {}), (11, 2, 13)),
        ("of_other_names", ((), {"second": 2, "first": 1}), (11, 2, 13)),
        ("all_have_defaults", ((), {}), (17, 2, 18)),
        ("all_have_defaults", ((), {"two": 3}), (17, 3, 18)),
        ("with_more", ((1, 2, 3), {"four": 4, "five": 5}), (11, 2, 13, 4, {"five": 5})),
    ],
)
def test_every_way_of_calling_it(name: str, call: Call, expected: object) -> None:
    original = getattr(Synapse(), name)
    replacement = in_place_of(original, adding(original))
    args, options = call
    assert replacement(*args, **options) == expected


def test_a_call_that_the_function_would_refuse_is_refused() -> None:
    original = Synapse().all_by_either
    with pytest.raises(TypeError, match="missing a required argument: 'two'"):
        in_place_of(original, adding(original))(1)


def test_it_has_the_name_and_the_signature() -> None:
    original = Synapse().later
    replacement = in_place_of(original, adding(original))
    assert replacement.__name__ == "later"
    assert inspect.signature(replacement) == inspect.signature(original)
    assert inspect.iscoroutinefunction(replacement)
    coroutine = replacement(1, 2)
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    assert ended.value.value == (11, 2, 13)


def test_one_replacement_is_replaced_by_another() -> None:
    """Also if the function says itself what it takes, as those of some decorators do."""

    def said(self: Any, one: int, two: int, three: int = 3) -> Any:
        return one, two, three

    vars(said)["__signature__"] = inspect.signature(said)
    original = type("Owner", (), {"said": said})().said
    first = in_place_of(original, adding(original))
    second = in_place_of(first, adding(first))
    assert second(1, 2, 3) == (21, 2, 23)
    assert inspect.signature(second) == inspect.signature(original)


def test_somebody_elses_replacement_passes_on_what_comes() -> None:
    def anything(*args: int, **options: int) -> Any:
        return args, options

    assert in_place_of(anything, adding(anything))(1, 2, three=3) == ((11, 2), {"three": 13})


def test_what_takes_the_same_is_called_as_it_is() -> None:
    def same(one: int, two: int, *, three: int = 3) -> Any:
        return three, two, one

    def more(one: int, two: int, *, three: int = 3, **options: Any) -> Any:
        return one, two, three, options

    def another_default(one: int, two: int, *, three: int = 4) -> Any:
        return one, two, three

    original = Synapse().last_by_name
    assert in_place_of(original, same) is same
    assert same(1, 2) == (3, 2, 1)
    assert inspect.signature(same) == inspect.signature(original)
    assert in_place_of(original, more) is more
    adapted = in_place_of(original, another_default)
    assert adapted(1, 2) == (1, 2, 3), "the default is the original's"


async def _sooner(one: int, two: int, three: int = 3) -> Any:
    return one, two, three


def test_what_gives_something_to_wait_for_still_does() -> None:
    def sooner(one: int, two: int, three: int = 3) -> Any:
        return _sooner(one, two, three)

    placed = in_place_of(Synapse().later, sooner)
    assert placed is sooner, "nothing is between"
    again = in_place_of(placed, adding(Synapse().later))
    for number, function in enumerate((placed, again)):
        with pytest.raises(StopIteration) as ended:
            function(1, 2).send(None)
        assert ended.value.value == ((1, 2, 3), (11, 2, 13))[number]


def test_what_passes_on_the_rest_as_it_comes_is_called_as_it_is() -> None:
    def first(one: int, *args: Any, **options: Any) -> Any:
        return one, args, options

    def looks_at_the_last(one: int, *args: Any, three: int = 0, **options: Any) -> Any:
        return one, args, three, options

    def has_no_way_for_the_rest(one: int, **options: Any) -> Any:
        return one, options

    original = Synapse().all_by_either
    assert in_place_of(original, first) is first
    assert first(1, 2, three=4) == (1, (2,), {"three": 4})
    assert inspect.signature(first) == inspect.signature(original)
    assert in_place_of(original, looks_at_the_last)(1, 2, 4) == (1, (), 4, {"two": 2})
    assert in_place_of(original, has_no_way_for_the_rest)(1, 2) == (1, {"two": 2})
