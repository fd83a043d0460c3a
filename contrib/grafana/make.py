"""Writes synapse-sticky.json, the dashboard for Grafana: ``python contrib/grafana/make.py``.

The variables, panels and units are those of the dashboard that Synapse ships.
"""

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("synapse-sticky.json")

_SOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
_OF = 'server_name="$server_name",job=~"$job",instance=~"$instance"'
_WIDTH, _HEIGHT = 12, 9

Query = tuple[str, str]
"""An expression, and its legend."""

Panel = tuple[str, str, str, list[Query]]
"""Title, unit, description, queries."""


def now(name: str, by: str = "job, instance", how: str = "sum", labels: str = "") -> str:
    """The value of a gauge."""
    return f"{how} by ({by}) (synapse_sticky_{name}{{{_OF}{labels}}})"


def rate(name: str, by: str, labels: str = "") -> str:
    """How much a counter counts a second."""
    selected = f"synapse_sticky_{name}{{{_OF}{labels}}}"
    return f"sum by ({by}) (rate({selected}[$bucket_size]))"


def average(duty: str = "") -> str:
    """How long calls took on an average, in seconds."""
    labels = f',duty="{duty}"' if duty else ""
    total, count = (rate(f"duty_seconds_{n}", "duty, path", labels) for n in ("sum", "count"))
    return f"{total} / {count}"


def late(quantile: float) -> str:
    """How long nearly all calls took, in seconds."""
    buckets = rate("duty_seconds_bucket", "duty, path, le")
    return f"histogram_quantile({quantile}, {buckets})"


ROWS: list[tuple[str, list[Panel]]] = [
    (
        "Overview",
        [
            (
                "Duties that are not on",
                "short",
                "Processes in which a duty is off or unfit. A duty may be off on purpose.",
                [
                    (
                        now("duty", "duty, state", labels=',state=~"off|unfit|native"'),
                        "{{duty}} {{state}}",
                    )
                ],
            ),
            (
                "Active sticky events",
                "short",
                "Unexpired sticky events, and rows of the index, in the process with most.",
                [
                    (now("active_events", "server_name", "max"), "active events"),
                    (now("index_rows", "server_name", "max"), "index rows"),
                ],
            ),
            (
                "Index: behind the stream by",
                "short",
                "Stream IDs. Above 0 for minutes, syncs ask the database.",
                [(now("index_lag"), "{{job}} {{instance}}")],
            ),
            (
                "Sticky events for syncs: answered by",
                "hertz",
                "What the index cannot answer is handed over to Synapse's own query.",
                [(rate("sync_questions_total", "by"), "{{by}}")],
            ),
            (
                "Panics of the Rust core",
                "short",
                "Each is a bug. Please report it.",
                [(rate("panics_total", "duty"), "{{duty}}")],
            ),
        ],
    ),
    (
        "Limits",
        [
            (
                "Deferred, by limit",
                "hertz",
                "Sticky events of other servers that are persisted now and delivered later.",
                [(rate("deferred_total", "limit"), "{{limit}}")],
            ),
            (
                "Refused with 429, by limit",
                "hertz",
                "per_user is about local users, all others about other servers.",
                [(rate("refused_total", "limit"), "{{limit}}")],
            ),
            (
                "Deferred events: what becomes of them",
                "hertz",
                "Expired ones were never delivered as sticky.",
                [
                    (rate("released_total", "limit"), "released, {{limit}}"),
                    (rate("deferred_expired_total", "limit"), "expired, {{limit}}"),
                ],
            ),
            (
                "Deferred now",
                "short",
                "By event persister. Observed: what would be deferred in mode observe.",
                [
                    (now("deferred_waiting"), "{{job}} {{instance}}"),
                    (now("observed_waiting"), "observed, {{job}} {{instance}}"),
                ],
            ),
            (
                "Observed: what limits would do",
                "hertz",
                "In mode observe nothing of this is done.",
                [
                    (
                        rate("observed_total", "outcome, limit") + " or vector(0)",
                        "{{outcome}}, {{limit}}",
                    )
                ],
            ),
        ],
    ),
    (
        "Newcomers",
        [
            (
                "Open newcomers",
                "short",
                "Servers that newly joined a room and may lack sticky events, one for each room.",
                [(now("newcomers_open"), "{{job}} {{instance}}")],
            ),
            (
                "Oldest open newcomer",
                "s",
                "Since this process started, at the longest.",
                [(now("newcomer_oldest_seconds", how="max"), "{{job}} {{instance}}")],
            ),
            (
                "Own sticky events to newcomers, by step",
                "hertz",
                "Given up: lost twice by the newcomer, or expired unacknowledged.",
                [(rate("pushed_events_total", "step"), "{{step}}")],
            ),
            (
                "Questions to newcomers, by answer",
                "hertz",
                "limited: answered 429.",
                [(rate("newcomer_questions_total", "answer"), "{{answer}}")],
            ),
        ],
    ),
    (
        "Staged and parked PDUs",
        [
            (
                "Parked now",
                "short",
                "Of all processes, by why they could not be persisted. At most 500 of one server,"
                " and 5,000 in all.",
                [(now("parked_now", "reason", "max"), "{{reason}}")],
            ),
            (
                "Parked, by reason",
                "hertz",
                "Why an acknowledged sticky PDU could not be persisted.",
                [(rate("parked_total", "reason"), "{{reason}}")],
            ),
            (
                "Parked PDUs: what becomes of them",
                "hertz",
                "Dropped ones are lost, but for those redacted or purged.",
                [
                    (rate("parked_persisted_total", "server_name"), "persisted"),
                    (rate("parked_expired_total", "server_name"), "expired"),
                    (rate("parked_dropped_total", "reason"), "dropped, {{reason}}"),
                ],
            ),
            (
                "Staged sticky PDUs kept from pruning",
                "hertz",
                "Plain Synapse would have lost these.",
                [(rate("staged_kept_total", "server_name"), "kept")],
            ),
        ],
    ),
    (
        "Forward extremities",
        [
            (
                "Dummy events, and rooms left out",
                "hertz",
                "A room is left out for an hour if no local user can send a dummy event.",
                [
                    (rate("dummy_events_total", "server_name"), "dummy events"),
                    (rate("rooms_left_out_total", "server_name"), "rooms left out"),
                ],
            ),
        ],
    ),
    (
        "Time",
        [
            (
                "Time of a call, average",
                "s",
                "With what it waited for, such as the database.",
                [(average(), "{{duty}} {{path}}")],
            ),
            (
                "Time of a call, 99th percentile",
                "s",
                "By few buckets: 1 ms, 10 ms, 100 ms, 1 s, 10 s.",
                [(late(0.99), "{{duty}} {{path}}")],
            ),
            (
                "Calls",
                "hertz",
                "How often each duty is called on each path.",
                [(rate("duty_seconds_count", "duty, path"), "{{duty}} {{path}}")],
            ),
        ],
    ),
]


def panels() -> list[dict[str, Any]]:
    """Rows and panels, each with its place."""
    found: list[dict[str, Any]] = []
    y = 0
    for title, of_row in ROWS:
        place = {"h": 1, "w": 2 * _WIDTH, "x": 0, "y": y}
        row = {"collapsed": False, "gridPos": place, "panels": [], "title": title, "type": "row"}
        found.append({"id": len(found) + 1, **row})
        y += 1
        for number, panel in enumerate(of_row):
            column = number % 2
            place = {"h": _HEIGHT, "w": _WIDTH, "x": column * _WIDTH, "y": y}
            found.append({"id": len(found) + 1, "gridPos": place, **_panel(*panel)})
            if column or number == len(of_row) - 1:
                y += _HEIGHT
    return found


def _panel(title: str, unit: str, description: str, queries: list[Query]) -> dict[str, Any]:
    return {
        "datasource": _SOURCE,
        "description": description,
        "fieldConfig": {"defaults": {"min": 0, "unit": unit}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "datasource": _SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "range": True,
                "refId": chr(ord("A") + number),
            }
            for number, (expression, legend) in enumerate(queries)
        ],
        "title": title,
        "type": "timeseries",
    }


def _variable(name: str, query: str, **more: Any) -> dict[str, Any]:
    return {
        "datasource": _SOURCE,
        "definition": query,
        "name": name,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "type": "query",
        **more,
    }


def dashboard() -> dict[str, Any]:
    """All of it."""
    steps = ("30s", "1m", "2m", "5m", "10m", "15m")
    several = {"allValue": ".*", "includeAll": True, "multi": True}
    labels = 'synapse_sticky_duty{server_name="$server_name"'
    return {
        "description": "synapse-sticky: docs/metrics.md says what each panel means.",
        "editable": True,
        "graphTooltip": 1,
        "panels": panels(),
        "refresh": "30s",
        "schemaVersion": 37,
        "tags": ["matrix"],
        "templating": {
            "list": [
                {
                    "label": "datasource",
                    "name": "DS_PROMETHEUS",
                    "query": "prometheus",
                    "type": "datasource",
                },
                {
                    "auto": True,
                    "auto_count": 100,
                    "auto_min": "30s",
                    "label": "Bucket Size",
                    "name": "bucket_size",
                    "options": [{"text": step, "value": step} for step in steps],
                    "query": ",".join(steps),
                    "refresh": 2,
                    "type": "interval",
                },
                _variable("server_name", "label_values(synapse_sticky_duty, server_name)"),
                _variable("job", f"label_values({labels}}}, job)", **several),
                _variable("instance", f'label_values({labels},job=~"$job"}}, instance)', **several),
            ]
        },
        "time": {"from": "now-3h", "to": "now"},
        "title": "Synapse: sticky events",
        "uid": "synapse-sticky",
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    PATH.write_text(text())
