"""What stops the start, and what it says then."""

from typing import Any

import pytest

from tests.lab import Lab
from tests.lab.homeserver import StartError

pytestmark = pytest.mark.one_process


def start_error(lab: Lab, **options: Any) -> str:
    """Starts a server that must not start, and gives what it said."""
    lab.prepare()
    server = lab.make(**options)
    try:
        with pytest.raises(StartError) as error:
            server.first_start()
        return str(error.value)
    finally:
        lab.close_servers([server])


def test_wrong_option(lab: Lab) -> None:
    said = start_error(lab, config={"joins": {"windwo": 3}})
    assert "joins.windwo is no option; did you mean 'window'?" in said
    assert "config.joins.windwo" in said, "the path in homeserver.yaml"


def test_wrong_value(lab: Lab) -> None:
    said = start_error(lab, config={"joins": {"retry_max": "soon"}})
    assert "joins.retry_max must be a duration from 10 to 3600000 ms" in said


def test_without_synapses_own_sticky_events(lab: Lab) -> None:
    said = start_error(lab, extra={"experimental_features": {"msc4354_enabled": False}})
    assert "synapse-sticky needs Synapse's own sticky events. Add to homeserver.yaml:" in said
    assert "msc4354_enabled: true" in said


def test_older_synapse(lab: Lab) -> None:
    said = start_error(lab, module_name="tests.lab.variants.InOlderSynapse")
    assert "synapse-sticky needs Synapse 1.163 or later, this is 1." in said
    assert "Upgrade Synapse, or take the module out of `modules:`." in said


def test_synapse_with_another_signature(lab: Lab) -> None:
    said = start_error(lab, module_name="tests.lab.variants.InChangedSynapse")
    assert "synapse-sticky does not fit Synapse 1." in said
    assert ".insert_sticky_events_txn takes (self, txn): too many positional arguments" in said
