"""Debian's Prometheus, in a temporary folder, for as long as it is needed."""

import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from tests.lab import wait_until

ROOT = Path(__file__).parents[2]
RULES = ROOT / "contrib/prometheus/synapse-sticky.rules"
JOB = "synapse"

MISSING = "there is no prometheus here: apt-get install prometheus"
"""Why a test is skipped."""


def is_here() -> bool:
    return shutil.which("prometheus") is not None


class Prometheus:
    """Scrapes listeners on loopback each second, and goes by the project's rules."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: Any) -> Any:
        answer = requests.get(f"{self._url}/api/v1/{path}", parameters, timeout=30)
        if not answer.ok:
            raise requests.HTTPError(answer.text, response=answer)
        return answer.json()["data"]

    def is_up(self, targets: int) -> bool:
        """Has it scraped all of them?"""
        try:
            return len(self.query("up == 1")) == targets
        except requests.RequestException:
            return False  # it does not answer yet, or not yet in earnest

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """What the expression gives now: the labels and the value of each series."""
        found = self.get("query", query=expression)["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    def over_time(
        self, expression: str, start_s: float, end_s: float, step_s: float
    ) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """The same at each step: times in seconds since the epoch, and values."""
        found = self.get("query_range", query=expression, start=start_s, end=end_s, step=step_s)
        return [
            (series["metric"], [(at_s, float(value)) for at_s, value in series["values"]])
            for series in found["result"]
        ]


@contextmanager
def running(folder: Path, ports: Iterable[int]) -> Iterator[Prometheus]:
    """One that scrapes these ports."""
    targets = ", ".join(f'"127.0.0.1:{port}"' for port in ports)
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"rule_files: ['{RULES}']\n"
        "scrape_configs:\n"
        f"  - job_name: {JOB}\n"
        "    metrics_path: /_synapse/metrics\n"
        f"    static_configs: [{{targets: [{targets}]}}]\n"
    )
    # The port is nobody else's, as long as this is bound. Go's listeners may be there all the same.
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", 0))
    port: int = bound.getsockname()[1]
    command = [
        *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        prometheus = Prometheus(port)
        count = targets.count(":")
        wait_until(lambda: prometheus.is_up(count), "Prometheus to scrape all")
        yield prometheus
    finally:
        process.terminate()
        process.wait()
        bound.close()
