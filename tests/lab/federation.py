"""Requests to a homeserver's federation API in the name of another of the lab."""

from typing import Any
from urllib.parse import quote, urlencode

import requests
import urllib3
from signedjson.sign import sign_json
from signedjson.types import SigningKey

# The lab's certificates are self-signed.
urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)


class FederationRequester:
    """Signs requests as ``origin``; sends them to the server at ``port`` on 127.0.0.1."""

    def __init__(self, origin: str, key: SigningKey, destination: str, port: int) -> None:
        self._origin = origin
        self._key = key
        self._destination = destination
        self._port = port
        self._session = requests.Session()
        self._session.trust_env = False  # the environment may name another authority or a proxy
        self._session.verify = False

    def request(
        self, method: str, path: str, content: object = None, version: str = "v1"
    ) -> requests.Response:
        """``path`` follows ``/_matrix/federation/v1/``, quoted."""
        uri = f"/_matrix/federation/{version}/{path}"
        signed: dict[str, Any] = {
            "method": method,
            "uri": uri,
            "origin": self._origin,
            "destination": self._destination,
        }
        if content is not None:
            signed["content"] = content
        sign_json(signed, self._origin, self._key)
        ((key_id, signature),) = signed["signatures"][self._origin].items()
        header = (
            f'X-Matrix origin="{self._origin}",destination="{self._destination}",'
            f'key="{key_id}",sig="{signature}"'
        )
        return self._session.request(
            method,
            f"https://127.0.0.1:{self._port}{uri}",
            json=content,
            headers={"Authorization": header, "Host": self._destination},
            timeout=60,
        )

    def event(self, event_id: str) -> requests.Response:
        return self.request("GET", f"event/{quote(event_id, safe='')}")

    def state_ids(self, room_id: str, event_id: str) -> dict[str, list[str]]:
        """The IDs of the state before the event, and of its auth chain."""
        query = urlencode({"event_id": event_id})
        response = self.request("GET", f"state_ids/{quote(room_id, safe='')}?{query}")
        response.raise_for_status()
        ids: dict[str, list[str]] = response.json()
        return ids

    def make_join(self, room_id: str, user_id: str) -> requests.Response:
        """For rooms of the versions that Synapse makes by default, and the older ones."""
        path = f"make_join/{quote(room_id, safe='')}/{quote(user_id, safe='')}"
        versions = urlencode({"ver": [str(n) for n in range(1, 13)]}, doseq=True)
        return self.request("GET", f"{path}?{versions}")

    def backfill(self, room_id: str, event_id: str, limit: int) -> list[dict[str, Any]]:
        """PDUs from the event backwards."""
        query = urlencode({"v": event_id, "limit": limit})
        return self._pdus(self.request("GET", f"backfill/{quote(room_id, safe='')}?{query}"))

    def missing_events(
        self, room_id: str, earliest: list[str], latest: list[str]
    ) -> list[dict[str, Any]]:
        """PDUs between the two."""
        body = {"earliest_events": earliest, "latest_events": latest, "limit": 20, "min_depth": 0}
        response = self.request("POST", f"get_missing_events/{quote(room_id, safe='')}", body)
        response.raise_for_status()
        events: list[dict[str, Any]] = response.json()["events"]
        return events

    def send(
        self, transaction_id: str, pdus: Any, edus: list[Any] | None = None
    ) -> requests.Response:
        body = {"origin": self._origin, "origin_server_ts": 0, "pdus": pdus, "edus": edus or []}
        return self.request("PUT", f"send/{transaction_id}", body)

    @staticmethod
    def _pdus(response: requests.Response) -> list[dict[str, Any]]:
        response.raise_for_status()
        pdus: list[dict[str, Any]] = response.json()["pdus"]
        return pdus
