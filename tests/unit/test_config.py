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
from synapse_sticky.config import (
    DUTIES,
    FederationConfig,
    JoinsConfig,
    LimitConfig,
    LocalConfig,
    LocalMode,
    Mode,
    StickyConfig,
    Strict,
    parse,
)


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
            "federation": {
                "mode": "reject",
                "per_server": {"per_second": 0.5, "burst_count": 7},
                "per_server_in_room": {"per_second": 3},
                "per_sender": None,
                "per_room": None,
                "max_deferred_per_server": 1,
                "exempt_servers": ["*.example.org", "matrix.org"],
            },
            "local": {"mode": "observe", "per_user": None},
        }
    )
    assert config.joins == JoinsConfig(False, 99, 2_000, 3_600_000, False)
    assert not config.staging.keep_sticky
    assert not config.visibility.servers
    default = FederationConfig()
    assert default.per_server_in_room is not None
    assert config.federation == FederationConfig(
        mode=Mode.REJECT,
        per_server=LimitConfig(0.5, 7),
        per_server_in_room=LimitConfig(3.0, default.per_server_in_room.burst_count),
        per_sender=None,
        per_room=None,
        max_deferred_per_server=1,
        exempt_servers=("*.example.org", "matrix.org"),
    )
    assert config.local == LocalConfig(LocalMode.OBSERVE, None)


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


@pytest.mark.parametrize("value", [-1, 100_001, True, "5", 5.0, None])
def test_how_many_newcomers_are_watched(value: object) -> None:
    assert parse({}).joins.watched == 1_000
    assert parse({"joins": {"watched": 0}}).joins.watched == 0
    with pytest.raises(ConfigError) as error:
        parse({"joins": {"watched": value}})
    assert "joins.watched must be a whole number from 0 to 100000, not" in error.value.msg


@pytest.mark.parametrize(
    "option", [("joins", "enabled"), ("joins", "confirm"), ("staging", "keep_sticky")]
)
@pytest.mark.parametrize("value", [0, 1, "true", None, [], {}])
def test_wrong_booleans(option: tuple[str, str], value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse({option[0]: {option[1]: value}})
    assert f"{'.'.join(option)} must be true or false, not" in error.value.msg


@pytest.mark.parametrize(
    "value", [0, -1, "2", True, None, [], math.nan, math.inf, 1_000_001, pytest.param(10**500)]
)
def test_wrong_rates(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse({"federation": {"per_sender": {"per_second": value}}})
    assert "federation.per_sender.per_second must be a number from 0.001 to" in error.value.msg


@pytest.mark.parametrize("value", ["on", "DEFER", True, None, 1, ["defer"], {}])
def test_wrong_modes(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse({"federation": {"mode": value}})
    allowed = "federation.mode must be 'defer', 'reject', 'observe' or 'off', not"
    assert allowed in error.value.msg


@pytest.mark.parametrize("value", ["on", "defer", True, None, 0, ["off"], {}])
def test_wrong_local_modes(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse({"local": {"mode": value}})
    assert "local.mode must be 'reject', 'observe' or 'off', not" in error.value.msg


def test_a_bare_off_in_yaml_is_false() -> None:
    config = parse({"federation": {"mode": False}, "local": {"mode": False}})
    assert config.federation.mode is Mode.OFF
    assert config.local.mode is LocalMode.OFF


@pytest.mark.requirement("H6")
def test_limits_can_be_observed_without_being_applied() -> None:
    config = parse({"federation": {"mode": "observe"}, "local": {"mode": "observe"}})
    assert config.federation.mode is Mode.OBSERVE
    assert config.local.mode is LocalMode.OBSERVE
    # Nothing refuses other servers. Deferral and sending count.
    assert [name for name in DUTIES if not config.is_on(name)] == ["receipt"]
    assert config.federation.applied() == FederationConfig(mode=Mode.OFF)
    for mode in ("defer", "reject", "off"):
        section = parse({"federation": {"mode": mode}}).federation
        assert section.applied() is section


@pytest.mark.parametrize("value", ["matrix.org", None, [1], [""], {}, [None]])
def test_wrong_exemptions(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse({"federation": {"exempt_servers": value}})
    assert "federation.exempt_servers must be a list of server names" in error.value.msg


def test_exemptions() -> None:
    config = parse({"federation": {"exempt_servers": ["*.example.org", "a?.com", "b.com:8448"]}})
    exempts = config.federation.exempts()
    servers = ["x.example.org", "X.Example.ORG", "a1.com", "b.com:8448"]
    assert all(exempts(server) for server in servers)
    others = ["example.org", "x.example.org.evil", "a.com", "b.com", "", "*.example.org\n"]
    assert not any(exempts(server) for server in others)


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
        ({1: {}}, ("1",), "1 is no option; there are: strict, native, index, delivery"),
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
        (
            {"federation": {"per_sevrer": None}},
            ("federation", "per_sevrer"),
            "federation.per_sevrer is no option; did you mean 'per_server'?",
        ),
        (
            {"federation": {"per_room": {"per_minute": 3}}},
            ("federation", "per_room", "per_minute"),
            "federation.per_room.per_minute is no option; there are: per_second, burst_count",
        ),
        (
            {"local": {"per_user": 3}},
            ("local", "per_user"),
            "must be a mapping of options, not 3; there are: per_second, burst_count",
        ),
        ({"local": None}, ("local",), "local must be a mapping of options, not None"),
        (
            {"federation": {"max_deferred_per_server": 0}},
            ("federation", "max_deferred_per_server"),
            "must be a whole number from 1 to 1000000, not 0",
        ),
        (
            {"federation": {"max_staged_per_server_in_room": 49}},
            ("federation", "max_staged_per_server_in_room"),
            "must be a whole number from 50 to 1000000, not 49",
        ),
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


KEYS = st.sampled_from(
    [
        *(
            "joins",
            "staging",
            "visibility",
            "window",
            "retry_min",
            "retry_max",
            "federation",
            "local",
        ),
        *("per_server", "per_user", "per_second", "burst_count", "mode", "exempt_servers"),
    ]
)
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


@pytest.mark.requirement("H6")
@pytest.mark.parametrize("duty", DUTIES)
def test_each_duty_can_be_switched_off(duty: str) -> None:
    assert parse({}).is_on(duty)
    config = parse({duty: {"enabled": False}})
    assert [name for name in DUTIES if not config.is_on(name)] == [duty]


@pytest.mark.requirement("H6")
def test_old_options_say_the_same() -> None:
    config = parse({"staging": {"keep_sticky": False}, "dummy_events": {"per_minute": 12}})
    assert [name for name in DUTIES if not config.is_on(name)] == ["pruning", "parking"]
    assert config == parse({"staging": {"keep_sticky": False}, "extremities": {"per_minute": 12}})
    assert not parse({"dummy_events": {"enabled": False}}).is_on("extremities")
    with pytest.raises(ConfigError) as error:
        parse({"dummy_events": {}, "extremities": {}})
    assert "dummy_events is the old name of extremities, which is set as well" in error.value.msg
    # An error has the name that stands in the file.
    with pytest.raises(ConfigError) as error:
        parse({"dummy_events": {"per_minute": 0}})
    assert error.value.msg.startswith("dummy_events.per_minute must be a whole number")
    assert tuple(error.value.path or ()) == ("dummy_events", "per_minute")


@pytest.mark.requirement("H5")
@pytest.mark.parametrize(
    ("value", "expected"), [(False, Strict.NO), (True, Strict.ALL), ("access", Strict.ACCESS)]
)
def test_strict(value: object, expected: Strict) -> None:
    assert parse({"strict": value}).strict is expected


@pytest.mark.requirement("H5")
@pytest.mark.parametrize("value", ["true", 1, None, [], "acces"])
def test_wrong_strict(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse({"strict": value})
    assert "strict must be true, false or 'access', not" in error.value.msg


@pytest.mark.requirement("H5")
def test_native() -> None:
    assert parse({"native": ["joins", "sliding"]}).native == ("joins", "sliding")
    for value in ("joins", ["join"], [1], None):
        with pytest.raises(ConfigError) as error:
            parse({"native": value})
        assert "native must be a list of duties: index, delivery, " in error.value.msg
