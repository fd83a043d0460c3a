"""Parked PDUs are tried again, until they are persisted or expire (L3, H2).

PDUs that lack nothing any more are tried all at once, but only once: some PDUs always fail. Then,
and where prev_events or auth_events are missing, a few PDUs of each origin and room are tried at a
time (pace.py). Else a server that does not answer would hold up the room for too long.

Once something of an origin is persisted after failures, its other rooms have their next round at
once. The same holds when Synapse learns that the origin is up. While Synapse backs the origin off,
no PDU is tried that needs it: it is asked whether it answers.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.staging.parking.pace import ROUNDS, Pace, Paces, Pair, of_round
from synapse_sticky.handlers.staging.parking.pdus import LONGEST_MS, Here, ScheduledPdu
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.homeserver import Cancellable, Homeserver
from synapse_sticky.logs import bounded

if TYPE_CHECKING:
    from synapse_sticky.handlers.staging.parking.handler import Staging
    from synapse_sticky.homeserver.rooms import Rooms

logger = bounded(__name__)

FIRST_TRY_MS = 1_000
"""After a PDU was parked."""

_AFTER_FAILURE = Backoff(1_000, 60_000, spread=0)
_CHECK_AFTER_MS = 1_000

_ABSENT_MAX_MS = 15_000
"""How late it is seen that a room was joined."""

_MOST_TRIED = 10_000
"""Twice as many as may be parked in all. One that is no longer remembered is only tried again."""

_POLL_MS = 60_000
"""Another process may have parked PDUs, and be gone."""

_AFTER_FAILURE_MS = 10_000
"""When one origin's PDUs of a room are tried again, if something is wrong with them."""

_PAIRS_AT_ONCE = 50
_MOST_ROOMS = 10
"""In so many rooms a server is asked at the same time. A plain Synapse takes 50 questions."""

_MOST_ASKED = 100
"""So many origins are asked within ten seconds whether they answer."""


class Origins(Protocol):
    """The servers that PDUs came from."""

    def on_up(self, listener: Callable[[str], None]) -> None:
        """Calls back with the name of a server that Synapse backed off, once it is known to
        answer."""

    async def is_backed_off(self, origin: str) -> bool:
        """Does Synapse ask the server nothing for now?"""

    async def ask(self, origin: str) -> None:
        """Asks the server something small, although Synapse backs it off. If it answers, Synapse
        backs it off no longer, and ``on_up`` says so. Its silence changes nothing."""

    async def still_staged(self, origin: str, event_ids: Collection[str]) -> set[str]:
        """Those of this origin's PDUs that are staged."""


class Trying:
    """Has parked PDUs processed again."""

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: "Rooms",
        staging: "Staging",
        table: ParkedTable,
        origins: Origins,
        note_absent: Callable[..., None],
    ) -> None:
        """
        Args:
            note_absent: takes the IDs of rooms with parked PDUs that this server is not in.
        """
        self._homeserver = homeserver
        self._rooms = rooms
        self._staging = staging
        self._table = table
        self._origins = origins
        self._note_absent = note_absent
        self._try_due = homeserver.metrics.timed("parking", "try", self.try_due)
        self._timer: Cancellable | None = None
        self._timer_due_ms = 0
        self._is_trying = False
        self._failures = 0
        self._paces = Paces()
        # When origins were asked lately whether they answer.
        self._asked_ms: dict[str, int] = {}
        self._to_ask: OrderedDict[str, None] = OrderedDict()
        # Origins and rooms that could not even be put off in the table, and until when they are.
        self._put_off_ms: dict[Pair, int] = {}
        # What this process tried when it lacked nothing, by origin and event ID.
        self._tried: OrderedDict[tuple[str, str], None] = OrderedDict()

    def install(self) -> None:
        """Takes effect from now on."""
        self._origins.on_up(self._wake)

    def within(self, delay_ms: int) -> None:
        """Tries the parked PDUs that are due, at the latest after this time."""
        at_ms = self._homeserver.steady_ms() + delay_ms
        if self._timer is not None and self._timer.active():
            if self._timer_due_ms <= at_ms:
                return
            self._timer.cancel()
        self._timer_due_ms = at_ms
        self._timer = self._homeserver.call_later(delay_ms, "try_parked_pdus", self._try_due)

    def _wake(self, origin: str) -> None:
        if self._paces.wake(origin, self._homeserver.steady_ms()):
            self.within(0)

    async def try_due(self) -> None:
        """Tries the PDUs that are due now, and again when the next ones are."""
        if self._is_trying:
            self.within(_CHECK_AFTER_MS)
            return
        self._is_trying = True
        delay_ms = _AFTER_FAILURE.after(self._failures + 1)
        try:
            await self._try_pairs(await self._due())
            delay_ms = min(max(await self._wait_ms(), _CHECK_AFTER_MS), _POLL_MS)
            self._failures = 0
        except Exception:
            self._failures += 1
            logger.exception("Could not stage parked PDUs, trying again in %d ms", delay_ms)
        finally:
            self._is_trying = False
            self.within(delay_ms)

    async def _due(self) -> Iterable[Pair]:
        now_ms = self._homeserver.steady_ms()
        for pair, until_ms in [*self._put_off_ms.items()]:
            if until_ms <= now_ms:
                del self._put_off_ms[pair]
        looks = self._paces.due(now_ms, _PAIRS_AT_ONCE)
        due = await self._table.due(self._put_off_ms)
        return dict.fromkeys(pair for pair in (*due, *looks) if pair not in self._put_off_ms)

    async def _wait_ms(self) -> int:
        """How long until there is something to do; negative if there is now."""
        (next_ms, counts), look_ms = await self._table.ahead(), self._paces.next_look_ms()
        self._homeserver.metrics.parked_now(counts)
        wait_ms = _POLL_MS if next_ms is None else next_ms - self._homeserver.now_ms()
        if wait_ms > LONGEST_MS:
            wait_ms = 0  # the clock was set back since
        return wait_ms if look_ms is None else min(wait_ms, look_ms - self._homeserver.steady_ms())

    async def _try_pairs(self, pairs: Iterable[Pair]) -> None:
        absent_from = []
        for origin, room_id in pairs:
            try:
                if not await self._try_room(origin, room_id):
                    absent_from.append(room_id)
            except Exception:
                # The PDUs of other origins and rooms do not wait for these.
                logger.exception("Could not stage PDUs of %s for %s again", origin, room_id)
                self._paces.forget((origin, room_id))
                await self._postpone(origin, room_id)
        self._note_absent(*absent_from)

    async def _postpone(self, origin: str, room_id: str) -> None:
        try:
            expired = await self._table.postpone(origin, room_id, _AFTER_FAILURE_MS)
            self._homeserver.metrics.unparked(0, expired)
        except Exception:
            # Here they are put off all the same, or they would come first again at once.
            logger.info("Could not put off PDUs of %s for %s", origin, room_id, exc_info=True)
            self._put_off_ms[origin, room_id] = self._homeserver.steady_ms() + _AFTER_FAILURE_MS

    async def _try_room(self, origin: str, room_id: str) -> bool:
        """Gives whether this server is in the room."""
        now_ms = self._homeserver.now_ms()
        parked = await self._table.of_room(origin, room_id)
        if not parked:
            self._paces.forget((origin, room_id))
            return True
        if self._staging.is_joining(room_id) or not await self._rooms.is_in_room(room_id):
            # Until the room is joined Synapse would drop all, or have them in memory only.
            self._paces.forget((origin, room_id))
            expired = await self._table.stage_again(
                *(origin, room_id, []),
                ended=[pdu for pdu in parked if pdu.until_ms <= now_ms],
                due_ms={pdu: _next_ms(pdu, now_ms, _ABSENT_MAX_MS) for pdu in parked},
                stage_txn=self._staging.stage_txn,
            )
            self._homeserver.metrics.unparked(0, len(expired))
            return False
        pace = self._paces.of((origin, room_id))
        # Before it is read what is persisted: else some would seem to have failed.
        goes_on = bool(pace.under_way) and await self._origins.still_staged(origin, pace.under_way)
        here = await self._here(parked)
        ended = [p for p in parked if p.event_id in here.persisted or p.until_ms <= now_ms]
        gone = {pdu.event_id for pdu in ended}
        left = [pdu for pdu in parked if pdu.event_id not in gone]
        self._look(
            (origin, room_id),
            goes_on=bool(goes_on),
            has_progress=bool(gone & here.persisted),
            lacks=any(p.event_id in pace.under_way and not here.has_all_before(p) for p in left),
        )
        share_ms = self._paces.share_ms(origin, self._homeserver.steady_ms())
        to_stage, due_ms = await self._next(origin, pace, share_ms, left, here)
        if to_stage:
            pace.begin([pdu.event_id for pdu in to_stage], self._homeserver.steady_ms())
        else:
            pace.begins_nothing(self._homeserver.steady_ms(), share_ms)
        # These are tried when they are due, and no more often.
        counted = [pdu for pdu in left if pdu.tries and pdu.is_due(now_ms)]
        due_ms.update((pdu, _next_ms(pdu, now_ms, LONGEST_MS // 2)) for pdu in counted)
        deleted = await self._table.stage_again(
            *(origin, room_id, [*to_stage, *counted]),
            ended=ended,
            due_ms=due_ms,
            stage_txn=self._staging.stage_txn,
        )
        persisted = len(deleted & here.persisted)
        self._homeserver.metrics.unparked(persisted, len(deleted) - persisted)
        if not left:
            self._paces.forget((origin, room_id))
        if to_stage or counted:
            await self._staging.process(room_id)
        return True

    async def _here(self, parked: Sequence[ScheduledPdu]) -> Here:
        prevs = {prev for pdu in parked for prev in pdu.prev_event_ids}
        auths = {auth for pdu in parked for auth in pdu.auth_event_ids}
        persisted = await self._staging.persisted({*prevs, *(pdu.event_id for pdu in parked)})
        return Here(persisted, await self._staging.existing(auths) if auths else set())

    def _look(self, pair: Pair, *, goes_on: bool, has_progress: bool, lacks: bool) -> None:
        """What has become of the last round?"""
        now_ms, rooms = self._homeserver.steady_ms(), self._paces.rooms(pair[0])
        pace = self._paces.of(pair)
        if goes_on:
            pace.goes_on(has_progress, now_ms)
        elif (pace.under_way or has_progress) and pace.ended(
            has_progress, rooms, now_ms, lacks=lacks
        ):
            self._paces.wake(pair[0], now_ms)
        self._paces.note(pair)

    async def _next(
        self, origin: str, pace: Pace, share_ms: int, left: Sequence[ScheduledPdu], here: Here
    ) -> tuple[list[ScheduledPdu], dict[ScheduledPdu, int]]:
        """What is to be staged now, and when the PDUs are due next."""
        now_ms = self._homeserver.now_ms()
        waiting = [pdu for pdu in left if not pdu.tries]
        to_stage = self._complete(origin, waiting, here)
        complete = {pdu.event_id for pdu in to_stage}
        waiting = [pdu for pdu in waiting if pdu.event_id not in complete]
        waiting.sort(key=lambda pdu: (pdu.due_ms, pdu.received_ts_ms, pdu.event_id))
        chosen: list[ScheduledPdu] = []
        if waiting and pace.may_begin(self._homeserver.steady_ms(), share_ms):
            chosen = await self._chosen(origin, pace, waiting, here)
        in_order = waiting
        if chosen:
            tried = {pdu.event_id for pdu in chosen}
            in_order = [*(pdu for pdu in waiting if pdu.event_id not in tried), *chosen]
        due_ms = dict.fromkeys(to_stage, now_ms + ROUNDS.max_ms)
        if chosen or any(pdu.is_due(now_ms) for pdu in waiting):
            # The table keeps their order.
            next_ms = now_ms + pace.look_again_ms(self._homeserver.steady_ms(), share_ms)
            due_ms.update((pdu, next_ms + n) for n, pdu in enumerate(in_order))
        return [*to_stage, *chosen], due_ms

    async def _chosen(
        self, origin: str, pace: Pace, waiting: Sequence[ScheduledPdu], here: Here
    ) -> list[ScheduledPdu]:
        """The PDUs of the next round."""
        if self._paces.under_way(origin) >= _MOST_ROOMS:
            pace.put_off(self._homeserver.steady_ms())
            return []
        if not await self._origins.is_backed_off(origin):
            return of_round(waiting, pace.at_once)
        able = [pdu for pdu in waiting if here.has_all_before(pdu)]
        if not able:
            pace.pause(self._paces.rooms(origin), self._homeserver.steady_ms())
        if len(able) < len(waiting):
            self._ask(origin)
        return of_round(able, pace.at_once)

    def _ask(self, origin: str) -> None:
        """Asks the origin whether it answers, if it was not asked lately, and it is its turn."""
        now_ms = self._homeserver.steady_ms()
        lately = {o: ms for o, ms in self._asked_ms.items() if now_ms - ms < ROUNDS.max_ms}
        self._asked_ms = lately
        if origin not in lately:
            self._to_ask[origin] = None
        while self._to_ask and len(lately) < _MOST_ASKED:
            next_origin, _ = self._to_ask.popitem(last=False)
            if self._paces.rooms(next_origin):
                lately[next_origin] = now_ms
                self._homeserver.in_background("ask_origin", self._ask_now, next_origin)

    async def _ask_now(self, origin: str) -> None:
        try:
            await self._origins.ask(origin)
        except Exception:
            # Somebody asks again, as long as anything waits for it.
            logger.debug("%s does not answer", origin, exc_info=True)

    def _complete(
        self, origin: str, parked: Sequence[ScheduledPdu], here: Here
    ) -> list[ScheduledPdu]:
        """The PDUs that lack nothing: what they come after is here, or comes before the PDU in the
        result. No PDU is given a second time, as it may fail for ever."""
        here = Here({*here.persisted}, {*here.existing})
        complete = []
        for pdu in parked:
            key = (origin, pdu.event_id)
            if key not in self._tried and here.has_all_before(pdu):
                complete.append(pdu)
                here.persisted.add(pdu.event_id)
                here.existing.add(pdu.event_id)
                self._tried[key] = None
        while len(self._tried) > _MOST_TRIED:
            self._tried.popitem(last=False)
        return complete


def _next_ms(pdu: ScheduledPdu, now_ms: int, at_most_ms: int) -> int:
    waited_ms = now_ms - pdu.received_ts_ms
    return now_ms + min(max(waited_ms // 2, FIRST_TRY_MS), at_most_ms)
