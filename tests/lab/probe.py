"""The module with a window to look inside a running homeserver: for tests only."""

import json
from typing import Any

from synapse.module_api import ModuleApi
from twisted.web.resource import Resource
from twisted.web.server import Request

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import StickyConfig
from synapse_sticky.index import IndexFollower
from tests.lab.homeserver import PROBE_PATH


class ProbedModule(StickyEventsModule):
    """Answers at PROBE_PATH what the index of the process knows of ``?event_id=``."""

    def __init__(self, config: StickyConfig, api: ModuleApi) -> None:
        super().__init__(config, api)
        api.register_web_resource(PROBE_PATH, _Probe(self._wiring._follower))


class _Probe(Resource):
    isLeaf = True  # noqa: N815  # Twisted's name

    def __init__(self, follower: IndexFollower) -> None:
        Resource.__init__(self)  # type: ignore[no-untyped-call]  # Twisted's
        self._follower = follower

    def render_GET(self, request: Request) -> bytes:  # noqa: N802  # Twisted's name
        args: dict[bytes, Any] = request.args or {}
        event_id = args[b"event_id"][0].decode()
        answer = {
            "known": event_id in self._follower.index,
            "in_step": self._follower.in_step() and not self._follower.doubts([[event_id]]),
        }
        return json.dumps(answer).encode()
