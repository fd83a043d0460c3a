"""The page for administrators in a browser, on real homeservers (E3)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attr
import pytest

from tests.integration.rooms import deferred, limits
from tests.integration.test_deferral import HOURLY, limit
from tests.lab import Client, Homeserver, Lab, wait_until
from tests.lab.client import STICKY_PARAMETER
from tests.lab.scene import Scene, enter
from tests.page.browser import browse

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
HOSTILE = "<img src=x onerror=alert(1)><b>"

pytestmark = [pytest.mark.requirement("E3"), pytest.mark.one_process]


@attr.s(auto_attribs=True, frozen=True)
class Story:
    """A server on which an event of a peer is deferred, in a room with a hostile name."""

    scene: Scene[Homeserver]
    admin: Client
    pictures: Path
    own: str

    def browse(self, what: str) -> Any:
        """Does it in the browser."""
        alice, room_id = self.scene.alice, self.scene.room_id
        path = f"rooms/{quote(room_id)}/send/org.example.call/page?{STICKY_PARAMETER}=3600000"
        return browse(
            what,
            self.admin,
            other_token=self.scene.server.user("other", admin=True).access_token,
            user_token=alice.access_token,
            peer=self.scene.peer.name,
            room_id=room_id,
            hostile=HOSTILE,
            own=self.own,
            pictures=str(self.pictures),
            send={
                "url": f"{alice.base_url}/_matrix/client/v3/{path}",
                "token": alice.access_token,
            },
        )


@pytest.fixture(scope="module")
def story(
    lab: Lab, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    (server,) = lab.servers({"config": limits(per_sender=limit(HOURLY, 2))})
    peer = lab.peer()
    scene = enter(server, peer)
    scene.alice.send_state(scene.room_id, "m.room.name", {"name": HOSTILE})
    for _ in range(3):
        event_id, pdu = peer.sticky(scene.room, scene.eve, type=HOSTILE)
        assert scene.send(pdu) == {event_id: {}}
    wait_until(lambda: len(deferred(server)) == 1, "the last one to be deferred")
    is_recorded = request.config.getoption("--record")
    pictures = PICTURES if is_recorded else tmp_path_factory.mktemp("pictures")
    own = scene.alice.send_sticky(scene.room_id)
    yield Story(scene, server.user("admin", admin=True), pictures, own)
    peer.close()
    lab.close_servers([server])


def test_signing_in(story: Story) -> None:
    story.browse("sign_in")


def test_the_overview_updates_itself(story: Story) -> None:
    story.browse("overview")


def test_why_an_event_waits_and_no_name_is_html(story: Story) -> None:
    story.browse("way")


def test_what_nobody_sees_is_shown(story: Story) -> None:
    story.browse("unseen")


@pytest.mark.slow
def test_the_keyboard_is_enough(story: Story) -> None:
    story.browse("keyboard")


@pytest.mark.slow
def test_ten_thousand_rooms(story: Story) -> None:
    print(story.browse("many_rooms"))  # noqa: T201  # the figure


@pytest.mark.slow
def test_everybody_can_read_it(story: Story) -> None:
    story.browse("look")
    assert {file.name for file in story.pictures.glob("page-*.png")} == {
        *("page-confirmation.png", "page-event.png", "page-overview.png", "page-rooms.png"),
    }


def test_an_action_behind_a_confirmation(story: Story) -> None:
    """The last one: it releases what waits."""
    story.browse("act")
    wait_until(lambda: not deferred(story.scene.server), "what waited to be released")
    pushed = f"{story.scene.peer.name} is pushed {story.scene.room_id} again"
    wait_until(lambda: story.scene.server.log_has(pushed), "the push to begin")
