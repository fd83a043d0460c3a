"""Every metric moves, and every expression of dashboard and alerts has data, on a live lab (E3)."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Counter

from synapse_sticky import metrics
from synapse_sticky.metrics import STEPS
from tests.lab import Homeserver, Lab, Peer, wait_until
from tests.metrics import prometheus, story
from tests.metrics.prometheus import Prometheus
from tests.metrics.queries import Panel, alerts, filled_in, measured, panels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.requirement("E3"),
    pytest.mark.one_process,
    pytest.mark.skipif(not prometheus.is_here(), reason=prometheus.MISSING),
]

MOST_LINES = 150
"""Of the whole story, with its 400 events, in one process."""

Told = tuple[Prometheus, list[Homeserver]]


@pytest.fixture(scope="module")
def told(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """The story is told, and Prometheus has seen all of it."""
    folder: Path = tmp_path_factory.mktemp("prometheus")
    servers = story.servers(lab)
    peer: Peer = lab.peer()
    try:
        with prometheus.running(folder, [server.metrics_port for server in servers]) as running:
            story.Story(lab, *servers, peer).tell()
            yield running, list(servers)
    finally:
        peer.close()
        lab.close_servers(list(servers))


def has_data(found: list[tuple[dict[str, str], float]]) -> bool:
    return any(not math.isnan(value) for _, value in found)


def counters() -> list[str]:
    return [
        f"{described.name}_total"
        for one in vars(metrics).values()
        if isinstance(one, Counter)
        for described in one.describe()
    ]


@pytest.mark.parametrize("name", counters())
def test_each_counter_moves(told: Told, name: str) -> None:
    running, _ = told
    wait_until(lambda: running.query(f"sum({name}) > 0"), f"{name} to move")


@pytest.mark.parametrize("step", STEPS)
def test_each_step_of_a_push_is_counted(told: Told, step: str) -> None:
    running, _ = told
    expression = f'sum(synapse_sticky_pushed_events_total{{step="{step}"}}) > 0'
    wait_until(lambda: running.query(expression), f"{step} to be counted")


@pytest.mark.parametrize("panel", [pytest.param(panel, id=panel.title) for panel in panels()])
def test_each_panel_has_data(told: Told, panel: Panel) -> None:
    running, servers = told
    for query, _ in panel.queries:
        # Else there would always be data.
        of_module = query.removesuffix(" or vector(0)")
        asked = [filled_in(of_module, server.name) for server in servers]
        # What is only observed is there on one of them.
        wait_until(
            lambda asked=asked: any(has_data(running.query(expr)) for expr in asked),  # type: ignore[misc]
            f"data of {query}",
        )


@pytest.mark.parametrize("alert", [pytest.param(rule, id=rule["alert"]) for rule in alerts()])
def test_each_alert_has_data(told: Told, alert: dict[str, str]) -> None:
    running, _ = told
    expression = measured(alert)
    wait_until(lambda: has_data(running.query(expression)), f"data of {expression}")


def test_prometheus_takes_the_rules(told: Told) -> None:
    running, _ = told
    (group,) = running.get("rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert len(group["rules"]) == len(alerts())


def test_the_log_does_not_grow_with_traffic(told: Told) -> None:
    _, (defers, observes) = told
    entered = defers.query("SELECT COUNT(*) FROM events WHERE type = 'org.example.call'")
    assert entered[0][0] > 350
    for server in (defers, observes):
        found = story.lines(server)
        assert 10 < len(found) < MOST_LINES, "\n".join(found)


def test_what_has_happened_is_alerted(told: Told) -> None:
    running, _ = told
    expected = {
        *("StickyDeferredExpired", "StickyPdusDropped", "StickyPushesGivenUp"),
        # The first one, too: nothing was counted before.
        "StickyCorePanics",
    }

    def firing() -> set[str]:
        found = running.query('ALERTS{alertstate="firing"}')
        return {labels["alertname"] for labels, _ in found}

    wait_until(lambda: expected <= firing(), f"{expected} to fire", look=firing)
