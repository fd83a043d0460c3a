"""The configuration: defaults, and an error for everything wrong that names the option."""

import contextlib
import math
from typing import Any

import attr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synapse.module_api.errors import ConfigError

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import JoinsConfig, StickyConfig, parse


@pytest.mark.parametrize("nothing", [None, {}, {"joins": {}, "staging": {}, "visibility": {}}])
def test_defaults(nothing: object) -> None:
    assert parse(nothing) == StickyConfig()


def test_module_parses_its_config() -> None:
    config = StickyEventsModule.parse_config({"joins": {"window": 7}})
    assert config == StickyConfig(joins=JoinsConfig(window=7))


def test_configuration_is_frozen() -> None:
    with pytest.raises(attr.exceptions.FrozenInstanceError):
        parse({}).joins.window = 3  # type: ignore[misc]  # what mypy forbids must fail


def test_everything_set() -> None:
    config = parse(
        {
            "joins": {
                "enabled": False,
                "window": 99,
                "retry_min": "2s",
                "retry_max": "1h",
                "confirm": False,
            },
            "staging": {"keep_sticky": False},
            "visibility": {"servers": False},
        }
    )
    assert config.joins == JoinsConfig(False, 99, 2_000, 3_600_000, False)
    assert not config.staging.keep_sticky
    assert not config.visibility.servers


@pytest.mark.parametrize(
    ("value", "expected_ms"),
    [(10, 10), ("10", 10), ("1s", 1_000), ("5m", 300_000), ("1h", 3_600_000)],
)
def test_durations(value: object, expected_ms: int) -> None:
    config = parse({"joins": {"retry_min": value, "retry_max": "1h"}})
    assert config.joins.retry_min_ms == expected_ms


WRONG_DURATIONS: list[object] = [
    *(True, 1.5, None, [], {}, "", "s", "h1", "-1s", "+1s", "1 s", "1_0", "1.5s", "1s\n"),
    *(-1, 0, 9, "2h", 3_600_001, "9" * 16, math.nan, "\u0661s", "500ms"),
]


@pytest.mark.parametrize("value", WRONG_DURATIONS)
def test_wrong_durations(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse({"joins": {"retry_max": value}})
    assert "joins.retry_max must be a duration from 10 to 3600000 ms" in error.value.msg


@pytest.mark.parametrize(
    "value", [0, 100, -1, True, "5", 5.0, None, [], math.inf, pytest.param(10**5000, id="huge")]
)
def test_wrong_integers(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse({"joins": {"window": value}})
    assert "joins.window must be a whole number from 1 to 99, not" in error.value.msg


@pytest.mark.parametrize(
    "option", [("joins", "enabled"), ("joins", "confirm"), ("staging", "keep_sticky")]
)
@pytest.mark.parametrize("value", [0, 1, "true", None, [], {}])
def test_wrong_booleans(option: tuple[str, str], value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse({option[0]: {option[1]: value}})
    assert f"{'.'.join(option)} must be true or false, not" in error.value.msg


@pytest.mark.parametrize(
    ("config", "path", "message"),
    [
        ({"jions": {}}, ("jions",), "jions is no option; did you mean 'joins'?"),
        (
            {"joins": {"windwo": 3}},
            ("joins", "windwo"),
            "joins.windwo is no option; did you mean 'window'? there are: enabled, window, ",
        ),
        ({"joins": {"retry_min_ms": 30}}, ("joins", "retry_min_ms"), "is no option; did you mean"),
        ({1: {}}, ("1",), "1 is no option; there are: joins, staging, visibility"),
        ({"joins": None}, ("joins",), "joins must be a mapping of options, not None"),
        ({"joins": []}, ("joins",), "joins must be a mapping of options, not []"),
        (["joins"], (), "config must be a mapping of options, not ['joins']"),
        (7, (), "config must be a mapping of options, not 7"),
        (
            {"joins": {"retry_min": "10s", "retry_max": "9s"}},
            ("joins", "retry_max"),
            "joins.retry_max must not be less than joins.retry_min: 9000 ms is less than 10000 ms",
        ),
        ({"joins": {"retry_max": 400}}, ("joins", "retry_max"), "must not be less than"),
    ],
)
def test_errors_name_the_option(config: object, path: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(config)
    assert message in error.value.msg
    assert tuple(error.value.path or ()) == path


def test_long_values_are_cut() -> None:
    with pytest.raises(ConfigError) as error:
        parse({"joins": {"window": "x" * 10_000}})
    assert len(error.value.msg) < 250


KEYS = st.sampled_from(["joins", "staging", "visibility", "window", "retry_min", "retry_max"])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS | st.text(), inner),
    max_leaves=12,
)


@given(JSON)
def test_any_value_is_taken_or_refused_clearly(config: object) -> None:
    with contextlib.suppress(ConfigError):
        parsed = parse(config)
        assert 1 <= parsed.joins.window <= 99
        assert 10 <= parsed.joins.retry_min_ms <= parsed.joins.retry_max_ms <= 3_600_000
