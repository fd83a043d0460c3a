"""The API for administrators is as docs/admin-api.yaml says, whatever it is asked (E3)."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.conftest import Servers
from tests.lab import Homeserver
from tests.lab.admin_api import FILE, PATH

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

EXAMPLES = 25
"""Of each operation and mode: fewer than what is answered 429."""


@pytest.fixture
def server(servers: Servers) -> Homeserver:
    (server,) = servers({})
    return server


@pytest.mark.slow
@pytest.mark.requirement("E3", "H3")
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_any_request_is_answered_as_described(server: Homeserver, mode: str) -> None:
    """Requests as they are described, and others: none is an error of the server, and each answer
    has the status and the form that is described."""
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as described

    checks = [
        not_a_server_error,
        described.status_code_conformance,
        described.content_type_conformance,
        described.response_schema_conformance,
    ]
    if mode == "negative":
        checks.append(described.negative_data_rejection)
    schema = schemathesis.openapi.from_path(FILE)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 8
    for operation in operations:
        # Each operation by an administrator of its own, who may ask 200 times at once.
        headers = {"Authorization": f"Bearer {server.user('admin', admin=True).access_token}"}
        options = {"base_url": f"{server.base_url}{PATH}", "headers": headers}
        strategy = operation.as_strategy(generation_mode=GenerationMode(mode))
        _ask_many(strategy, options, checks)
    assert not server.log_has("Could not answer an administrator")


def _ask_many(strategy: Any, options: dict[str, Any], checks: list[Any]) -> None:
    @settings(max_examples=EXAMPLES, suppress_health_check=[*HealthCheck], database=None)
    @given(case=strategy)
    def ask(case: Any) -> None:
        case.validate_response(case.call(**options), checks=checks)

    ask()
