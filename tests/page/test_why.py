"""Why an event has not been delivered: the page says it as the API does, in each case (E3)."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Servers
from tests.integration import test_admin
from tests.lab import Client, Peer
from tests.page.browser import browse

pytestmark = [pytest.mark.requirement("E3"), pytest.mark.slow, pytest.mark.one_process]

SEVEN: dict[str, Callable[..., None]] = {
    "deferred": test_admin.test_it_is_deferred_by_per_sender,
    "parked": test_admin.test_it_is_parked_for_missing_prev_events,
    "soft_failed": test_admin.test_it_is_soft_failed,
    "redacted": test_admin.test_it_is_redacted,
    "unreachable": test_admin.test_the_newcomer_is_unreachable,
    "denied_by_acl": test_admin.test_its_server_is_denied_by_an_acl,
    "expired": test_admin.test_it_has_expired,
}


@pytest.mark.parametrize("code", SEVEN)
def test_the_page_says_why(
    code: str, servers: Servers, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API's own test makes the case. As soon as it is told what is the matter, the page is."""
    ask, seen = test_admin.why, list[str]()

    def ask_and_look(admin: Client, event_id: str, **query: Any) -> Any:
        answer = ask(admin, event_id, **query)
        codes = {answer["verdict"]["code"], *(reason["code"] for reason in answer["reasons"])}
        if code in codes and not seen:
            browse("why", admin, event_id=event_id, query=query, answer=answer)
            seen.append(event_id)
        return answer

    monkeypatch.setattr(test_admin, "why", ask_and_look)
    story = SEVEN[code]
    story(servers, peer) if code != "redacted" else story(servers)
    assert len(seen) == 1
