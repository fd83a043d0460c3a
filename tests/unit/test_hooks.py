"""A hook that does not fit is named."""

import pytest
from synapse.module_api.errors import ConfigError

from synapse_sticky.adapter import hooks


class Owner:
    constant = 5

    def method(self, first: int, second: int) -> int:
        return first + second


def test_a_method_that_fits() -> None:
    owner = Owner()
    assert hooks.method(owner, "method", "first", "second")(1, 2) == 3
    hooks.replace(owner, "method", "first", "second")(lambda first, second: first * second)
    assert owner.method(3, 4) == 12


@pytest.mark.parametrize(
    ("name", "parameters", "problem"),
    [
        ("gone", (), r"Owner\.gone is not there"),
        ("constant", (), r"Owner\.constant is not a function"),
        ("method", ("first",), r"Owner\.method takes \(first, second\) instead of \(first\)"),
        ("method", ("second", "first"), r"takes \(first, second\) instead of \(second, first\)"),
    ],
)
def test_a_method_that_does_not(name: str, parameters: tuple[str, ...], problem: str) -> None:
    for check in (hooks.method, hooks.replace):
        with pytest.raises(ConfigError, match=problem) as error:
            check(Owner(), name, *parameters)
        assert "take the module out of `modules:`" in error.value.msg
