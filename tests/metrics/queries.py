"""The expressions of the dashboard and of the alerts."""

import json
import re
from typing import Any

import attr
import yaml

from tests.metrics.prometheus import JOB, ROOT, RULES

DASHBOARD = ROOT / "contrib/grafana/synapse-sticky.json"

_COMPARES = re.compile(r"\s*(>|<|>=|<=|==|!=)\s*[\d.]+$")
_WINDOW = "1m"


@attr.s(auto_attribs=True, frozen=True)
class Panel:
    """queries: the expressions, each with its legend."""

    title: str
    unit: str
    queries: list[tuple[str, str]]


def panels() -> list[Panel]:
    """Those of the dashboard that draw something."""
    return [
        Panel(
            panel["title"],
            panel["fieldConfig"]["defaults"]["unit"],
            [(target["expr"], target["legendFormat"]) for target in panel["targets"]],
        )
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        if panel["type"] != "row"
    ]


def filled_in(expression: str, server_name: str) -> str:
    """With the dashboard's variables as Grafana fills them in."""
    values = {
        "server_name": server_name,
        "job": JOB,
        "instance": ".*",
        "bucket_size": _WINDOW,
    }
    for name, value in values.items():
        expression = expression.replace(f"${name}", value)
    assert "$" not in expression, expression
    return expression


def alerts() -> list[dict[str, Any]]:
    """The rules."""
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def measured(alert: dict[str, Any]) -> str:
    """What the alert compares with its threshold, which is always a number at its end."""
    expression, count = _COMPARES.subn("", alert["expr"].strip())
    assert count == 1, alert["alert"]
    return expression
