"""Each metric is explained and read by somebody, and no label is a stranger's choice (E3, H3)."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

from synapse_sticky import metrics
from synapse_sticky.handlers.joins.confirmation.asking import AnswerKind
from synapse_sticky.metrics import DUTY, GAUGES, PARKED_NOW, Metrics
from tests.metrics.prometheus import ROOT, RULES
from tests.metrics.queries import DASHBOARD, alerts, panels

PACKAGE = ROOT / "synapse_sticky"
PAGE = (ROOT / "docs/metrics.md").read_text()

ALLOWED_LABELS = {
    *("server_name", "duty", "state", "path", "limit", "outcome", "by"),
    *("step", "answer", "reason"),
}

pytestmark = pytest.mark.requirement("E3")


def exported() -> dict[str, Any]:
    """All metrics of the module, by the name that Prometheus has."""
    found = {}
    for metric in REGISTRY.collect():
        if metric.name.startswith("synapse_sticky_"):
            found[metric.name + ("_total" if metric.type == "counter" else "")] = metric
    return found


def rows() -> dict[str, tuple[str, set[str]]]:
    """What the page's table has: the type and the labels, by name."""
    cells = re.findall(r"^\| `(synapse_sticky_\w+)` \| (\w+) \|([^|]*)\|", PAGE, re.MULTILINE)
    return {name: (kind, {*re.findall(r"`(\w+)`", labels)}) for name, kind, labels in cells}


def expressions() -> str:
    """All that dashboard and alerts ask for."""
    asked = [query for panel in panels() for query, _ in panel.queries]
    return "\n".join([*asked, *(alert["expr"] for alert in alerts())])


def test_the_page_has_each_metric_and_no_other() -> None:
    expected = {}
    for name, metric in exported().items():
        (labels,) = {tuple(of) for of in label_names(metric.name)}
        expected[name] = (metric.type, {*labels} - {"server_name"})
    assert rows() == expected


def label_names(name: str) -> list[tuple[str, ...]]:
    of_module = [*vars(metrics).values(), *GAUGES.values()]
    found = [one for one in of_module if getattr(one, "_name", None) == name]
    return [one._labelnames for one in found]


def test_each_metric_has_a_reader_and_no_other_is_asked_for() -> None:
    asked = {*re.findall(r"synapse_sticky_\w+", expressions())}
    expected = set()
    for name, metric in exported().items():
        parts = ("_bucket", "_count", "_sum") if metric.type == "histogram" else ("",)
        expected |= {f"{name}{part}" for part in parts}
    assert asked == expected


def test_no_label_is_a_strangers_choice() -> None:
    for name, metric in exported().items():
        (labels,) = {tuple(of) for of in label_names(metric.name)}
        assert labels[0] == "server_name", name
        assert {*labels} <= ALLOWED_LABELS, name


def test_the_page_has_each_value_of_a_label() -> None:
    values = {
        *(*metrics.STATES, *metrics.ANSWERED_BY, *metrics.OUTCOMES, *metrics.STEPS),
        *(*metrics.ANSWERS, *metrics.REASONS, *metrics.DROPS, *metrics.REFUSING),
        *(*metrics.DEFERRING, metrics.NOT_RECORDED, *metrics.CORE),
    }
    assert {value for value in values if f"`{value}`" not in PAGE} == set()


SOURCES = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize(
    ("call", "values"),
    [
        (r'pushed\("(\w+)"', metrics.STEPS),
        (r'\.dropped\("(\w+)"', metrics.DROPS),
        (r'Renewed\(\s*\w+,\s*"(\w+)"', metrics.CORE),
        (r'answered\("(\w+)" if \w+ is None else "(\w+)"', metrics.ANSWERED_BY),
        (r'\.count(?:_each)?\("(\w+)"', metrics.OUTCOMES),
    ],
)
def test_what_is_counted_is_what_begins_at_0(call: str, values: tuple[str, ...]) -> None:
    found = {part for match in re.finditer(call, SOURCES) for part in match.groups()}
    assert found == {*values}


def test_answers_are_the_kinds_of_answers() -> None:
    assert {kind.name.lower() for kind in AnswerKind} == {*metrics.ANSWERS}


def test_each_path_is_explained() -> None:
    timed = re.findall(r'timed(?:_call)?\("(\w+)", "(\w+)"', SOURCES)
    assert len(timed) >= 14
    for duty, path in timed:
        assert re.search(rf"^\| {duty} \| [^|]*`{path}`", PAGE, re.MULTILINE), (duty, path)


def test_the_alert_about_slow_duties_leaves_out_where_nobody_waits() -> None:
    rows = re.findall(r"^\| \w+ \| ([^|]*) \|[^|]*\| ([^|]*) \|$", PAGE, re.MULTILINE)
    waits = {path: who for paths, who in rows for path in re.findall(r"`(\w+)`", paths)}
    nobody = {path for path, who in waits.items() if who.startswith("nobody")}
    (slow,) = [alert["expr"] for alert in alerts() if alert["alert"] == "StickyDutySlow"]
    assert {*re.findall(r'path!~"([^"]*)"', slow)} == {"|".join(sorted(nobody))}


# Homeservers in one process


def samples(server_name: str) -> dict[str, float]:
    return {
        f"{sample.name} {sorted(sample.labels.items())}": sample.value
        for metric in exported().values()
        for sample in metric.samples
        if sample.labels["server_name"] == server_name
    }


class Owner:
    """Something that a gauge is read of."""

    value = 5

    def read(self) -> float:
        return self.value / 1


def test_each_homeserver_counts_for_itself() -> None:
    one, other = Metrics("one.test"), Metrics("other.test")
    before = samples("other.test")
    one.pushed("sent", 3)
    one.limits.count("refused", "per_user", 2)
    one.panicked("index")
    assert samples("other.test") == before
    found = samples("one.test")
    name = "synapse_sticky_pushed_events_total [('server_name', 'one.test'), ('step', 'sent')]"
    assert found[name] == 3
    other.close()
    assert samples("one.test") == found


@pytest.mark.parametrize("duty", metrics.CORE)
def test_the_first_panic_is_seen(duty: str) -> None:
    """Prometheus sees no increase where there was nothing before."""
    Metrics("new.test")
    labels = {"server_name": "new.test", "duty": duty}
    assert REGISTRY.get_sample_value("synapse_sticky_panics_total", labels) == 0


def test_what_has_ended_shows_nothing_of_the_present() -> None:
    ended, owner = Metrics("ended.test"), Owner()
    ended.show("newcomers_open", owner, Owner.read)
    ended.set("index_lag", 1)
    ended.parked_now({"database": 1})
    ended.set_duty("index", "on")
    gauges = {gauge.describe()[0].name for gauge in (DUTY, PARKED_NOW, *GAUGES.values())}  # type: ignore[index]
    assert gauges & {name.split()[0] for name in samples("ended.test")}
    ended.close()
    ended.close()
    assert not gauges & {name.split()[0] for name in samples("ended.test")}


def test_what_cannot_be_read_hides_nothing_else() -> None:
    failing, owner = Metrics("failing.test"), Owner()
    failing.show("deferred_waiting", owner, Owner.read)
    name = "synapse_sticky_deferred_waiting"
    labels = {"server_name": "failing.test"}
    assert REGISTRY.get_sample_value(name, labels) == 5
    owner.value = "panicked"  # type: ignore[assignment]
    assert str(REGISTRY.get_sample_value(name, labels)) == "nan"
    # Nor does it keep alive what it is read of.
    del owner
    assert str(REGISTRY.get_sample_value(name, labels)) == "nan"
    failing.close()


# Dashboard and alerts


def test_the_dashboard_is_as_it_is_made() -> None:
    spec = importlib.util.spec_from_file_location("make", DASHBOARD.with_name("make.py"))
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert DASHBOARD.read_text() == make.text(), "run python contrib/grafana/make.py"


def test_each_alert_has_a_section() -> None:
    headings = {*re.findall(r"^### (Sticky\w+)$", PAGE, re.MULTILINE)}
    assert headings == {alert["alert"] for alert in alerts()}
    for alert in alerts():
        link = alert["annotations"]["runbook_url"]
        assert link == f"docs/metrics.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        # An increase is extrapolated: 166.92700128044407 events.
        assert "$value }}" not in alert["annotations"]["summary"]


NEEDS_PROMTOOL = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="there is no promtool here: apt-get install prometheus"
)

_ALL = 'server_name="here",instance="one"'
FIRING = {
    "StickyDutyUnfit": [('duty{duty="index",state="unfit",$}', "1x60")],
    "StickyDutyOff": [('duty{duty="joins",state="off",$}', "1x120")],
    "StickyCorePanics": [('panics_total{duty="index",$}', "0x9 1x60")],
    "StickyIndexBehind": [("index_lag{$}", "7x60")],
    "StickySyncsAskDatabase": [
        ('sync_questions_total{by="database",$}', "0+2x120"),
        ('sync_questions_total{by="index",$}', "0+8x120"),
    ],
    "StickyDeferredExpired": [('deferred_expired_total{limit="per_sender",$}', "0x50 1x60")],
    "StickyDeferredMany": [("deferred_waiting{$}", "1001x60")],
    "StickyRefusedMany": [('refused_total{limit="per_user",$}', "0+10x120")],
    "StickyNewcomerWaits": [("newcomer_oldest_seconds{$}", "0+60x60")],
    "StickyPushesGivenUp": [('pushed_events_total{step="given_up",$}', "0x9 1x60")],
    "StickyQuestionsLimited": [
        ('newcomer_questions_total{answer="limited",$}', "0+5x120"),
        ('newcomer_questions_total{answer="says",$}', "0+5x120"),
    ],
    "StickyParkedMany": [
        ('parked_now{reason="prev_events",$}', "1500x60"),
        ('parked_now{reason="database",$}', "1001x60"),
    ],
    "StickyPdusDropped": [('parked_dropped_total{reason="full",$}', "0x50 1x60")],
    "StickyParkedExpired": [("parked_expired_total{$}", "0x9 1x60")],
    "StickyRoomsLeftOut": [("rooms_left_out_total{$}", "0+1x120")],
    "StickyDutySlow": [
        ('duty_seconds_bucket{le="1.0",duty="delivery",path="sync",$}', "0+9x120"),
        ('duty_seconds_count{duty="delivery",path="sync",$}', "0+10x120"),
    ],
}
"""What each alert fires at, after an hour: series and their values each minute."""

CALM = [
    ('duty{duty="index",state="unfit",$}', "0x120"),
    ('duty{duty="index",state="on",$}', "1x120"),
    ('duty{duty="joins",state="off",$}', "1x30 0x90"),
    ('panics_total{duty="index",$}', "1x120"),
    ("index_lag{$}", "0 3 0 0x120"),
    ('sync_questions_total{by="database",$}', "0+1x120"),
    ('sync_questions_total{by="index",$}', "0+20x120"),
    ('deferred_expired_total{limit="per_sender",$}', "1x120"),
    ("deferred_waiting{$}", "1000x120"),
    ('refused_total{limit="per_user",$}', "0+1x120"),
    ("newcomer_oldest_seconds{$}", "0+20x60"),
    ('pushed_events_total{step="sent",$}', "0+20x120"),
    ('newcomer_questions_total{answer="limited",$}', "0+1x120"),
    ('newcomer_questions_total{answer="says",$}', "0+9x120"),
    ('parked_now{reason="prev_events",$}', "1500x120"),
    ('parked_now{reason="database",$}', "1000x120"),
    # Another process that sees the same.
    ('parked_now{reason="database",server_name="here",instance="two"}', "1000x120"),
    ('parked_dropped_total{reason="full",$}', "3x120"),
    ('parked_dropped_total{reason="purged",$}', "0x50 7x70"),
    ("parked_expired_total{$}", "3x120"),
    ("rooms_left_out_total{$}", "3x120"),
    ('duty_seconds_bucket{le="1.0",duty="delivery",path="sync",$}', "0+99x120"),
    ('duty_seconds_count{duty="delivery",path="sync",$}', "0+100x120"),
    ('duty_seconds_bucket{le="1.0",duty="extremities",path="round",$}', "0+1x120"),
    ('duty_seconds_count{duty="extremities",path="round",$}', "0+9x120"),
    ('duty_seconds_bucket{le="1.0",duty="joins",path="ask",$}', "0+1x120"),
    ('duty_seconds_count{duty="joins",path="ask",$}', "0+9x120"),
]
"""What no alert fires at."""


def promtool(*arguments: str) -> None:
    command = ["promtool", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def asks_in_an_hour(series: list[tuple[str, str]], expression: str, value: float) -> dict[str, Any]:
    asked = {
        "eval_time": "60m",
        "expr": expression,
        "exp_samples": [{"labels": "{}", "value": value}],
    }
    return {
        "interval": "1m",
        "input_series": [
            {"series": f"synapse_sticky_{name}".replace("$", _ALL), "values": values}
            for name, values in series
        ],
        "promql_expr_test": [asked],
    }


@NEEDS_PROMTOOL
def test_promtool_takes_the_rules() -> None:
    promtool("check", "rules", str(RULES))


@NEEDS_PROMTOOL
def test_each_alert_fires_and_none_without_a_cause(tmp_path: Path) -> None:
    assert FIRING.keys() == {alert["alert"] for alert in alerts()}
    tests = [
        asks_in_an_hour(
            series, f'count(ALERTS{{alertstate="firing",alertname="{name}"}}) or vector(0)', 1
        )
        for name, series in FIRING.items()
    ]
    tests.append(asks_in_an_hour(CALM, 'count(ALERTS{alertstate="firing"}) or vector(0)', 0))
    path = tmp_path / "alerts.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": tests}))
    promtool("test", "rules", str(path))
