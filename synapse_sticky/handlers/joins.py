"""A server that newly joins a room gets all own unexpired sticky events of it (P3, P7, F3).

New joins are read from the state changes, from a stored position on. Each newcomer is pushed to
through Synapse's own backlog of sticky events, in portions that fit a newcomer's staging area.
An event counts as delivered once the newcomer acknowledged it by ID and, when asked, has it: a
plain Synapse may prune what it acknowledged. What else Synapse notes in that backlog (events that
a destination missed while it was unreachable) goes out in the same way.

Fails open: if this cannot say what to send, Synapse's own selection goes on.
"""

import logging
from collections.abc import Collection, Sequence

import attr

from synapse_sticky._core import MAX_STICKY_DURATION_MS
from synapse_sticky.config import JoinsConfig
from synapse_sticky.handlers.push import CONFIRM_PATIENCE_MS, Backoff, Push, Sent
from synapse_sticky.homeserver import Batch, Cancellable, Homeserver, Possession, ServerJoin
from synapse_sticky.index import IndexFollower
from synapse_sticky.storage import Storage

logger = logging.getLogger(__name__)

_CONFIRM_MIN_MS = 100
_CONFIRM_MAX_MS = 5_000
_NUDGE_MIN_MS = 1_000
_NUDGE_MAX_MS = 60_000
_REFUSALS_TO_BELIEVE = 3
_READ_RETRY_MS = 5_000
_RECORD_EVERY_MS = 60_000
_ALL = 2**31


@attr.s(auto_attribs=True, slots=True)
class _Destination:
    """The pushes of one destination, and the one timer that they share."""

    pushes: dict[str, Push] = attr.Factory(dict)
    timer: Cancellable | None = None
    nudge_ms: int = _NUDGE_MIN_MS
    """How long after the next nudge the one after that is due: more each time, until something
    gets on."""
    next_nudge_ms: int = 0
    """When the next one is due for what is only to be looked at again."""

    def gets_on(self) -> None:
        """There may be something to do now; the next nudge is not to be long in coming."""
        self.nudge_ms = _NUDGE_MIN_MS
        self.next_nudge_ms = 0

    def cancel_timer(self) -> None:
        if self.timer is not None and self.timer.active():
            self.timer.cancel()


class JoinsHandler:
    """Pushes own sticky events to newcomers, for the destinations that this process sends to."""

    def __init__(
        self,
        homeserver: Homeserver,
        storage: Storage,
        follower: IndexFollower,
        config: JoinsConfig,
    ) -> None:
        self._hs = homeserver
        self._rooms = homeserver.rooms
        self._federation = homeserver.federation
        self._storage = storage
        self._follower = follower
        self._index = follower.index
        self._config = config
        self._backoff = Backoff(config.retry_min_ms, config.retry_max_ms)
        self._destinations: dict[str, _Destination] = {}
        self._position = 0
        self._recorded_ms = 0
        self._reading = False
        self._read_again = False

    async def start(self) -> None:
        """Takes up what an earlier run left, then follows the state changes."""
        self._position = await self._storage.state_position(
            self._hs.instance_name, self._rooms.state_position()
        )
        for newcomer in await self._storage.newcomers():
            if self._federation.handles(newcomer.destination):
                self._add(
                    newcomer.destination,
                    newcomer.room_id,
                    position=newcomer.position,
                    watch_until_ms=newcomer.watch_until_ms,
                )
        self._federation.serve_backlog_from(self.next_batch)
        self._federation.on_acknowledged(self._acknowledged)
        self._federation.on_caught_up(self._caught_up)
        self._federation.on_noted(self._noted)
        self._follower.on_new_events(self._new_events)
        self._hs.stream.on_advance(self._poke)
        self._poke()
        for destination, state in list(self._destinations.items()):
            # The index may have been filled before anybody listened.
            for push in state.pushes.values():
                self._update(push)
            self._schedule(destination)

    # Reading the state changes

    def _poke(self) -> None:
        self._read_again = True
        if not self._reading and self._rooms.state_position() > self._position:
            self._reading = True
            self._hs.in_background("read_joins", self._read_joins)

    async def _read_joins(self) -> None:
        try:
            while self._read_again:
                self._read_again = False
                while (up_to := self._rooms.state_position()) > self._position:
                    await self._read_page(up_to)
        except Exception:
            logger.exception("Could not read who joined, trying again in %d ms", _READ_RETRY_MS)
            self._hs.call_later(_READ_RETRY_MS, "read_joins_retry", self._poke_later)
        finally:
            self._reading = False

    async def _poke_later(self) -> None:
        self._poke()

    async def _read_page(self, up_to: int) -> None:
        now_ms = self._hs.now_ms()
        # An earlier join is of no interest: what was sent before it has expired by now.
        position, joins = await self._rooms.server_joins(
            after=self._position, up_to=up_to, not_before_ms=now_ms - MAX_STICKY_DURATION_MS
        )
        mine = [join for join in joins if self._federation.handles(join.destination)]
        watch_until_ms = now_ms + MAX_STICKY_DURATION_MS
        # Without a join, where this process is in the stream is worth a write now and then only.
        if mine or now_ms - self._recorded_ms > _RECORD_EVERY_MS:
            await self._storage.record_joins(self._hs.instance_name, position, mine, watch_until_ms)
            self._recorded_ms = now_ms
        self._position = position
        for join in mine:
            self._newcomer(join, watch_until_ms)
        for join in joins:
            if join.destination == self._hs.server_name:
                self._go_on(join.room_id)

    def _newcomer(self, join: ServerJoin, watch_until_ms: int) -> None:
        logger.info("%s has newly joined %s", join.destination, join.room_id)
        self._add(join.destination, join.room_id, position=0, watch_until_ms=watch_until_ms)
        self._federation.wake(join.destination)
        self._schedule(join.destination)

    def _go_on(self, room_id: str) -> None:
        """This server is in the room again: what it could not send meanwhile is due."""
        for destination, state in list(self._destinations.items()):
            push = state.pushes.get(room_id)
            if push is not None and push.held:
                push.held = False
                self._federation.wake(destination)

    def _add(self, destination: str, room_id: str, *, position: int, watch_until_ms: int) -> Push:
        push = Push(
            destination,
            room_id,
            position=position,
            watch_until_ms=watch_until_ms,
            backoff=self._backoff,
        )
        state = self._destinations.setdefault(destination, _Destination())
        state.pushes[room_id] = push
        state.gets_on()
        return push

    # Sending

    async def next_batch(self, destination: str, limit: int) -> Batch | None:
        """The next own sticky events for the destination, at most ``limit``; None if there are
        none for now. Called by Synapse whenever it is the backlog's turn."""
        await self._adopt(destination)
        state = self._destinations.get(destination)
        if state is None:
            return None
        try:
            for room_id, push in list(state.pushes.items()):
                if push.idle(self._hs.now_ms()):
                    continue
                batch = await self._batch_of(push, limit)
                if batch is not None:
                    # The room goes to the end of the line.
                    if state.pushes.get(room_id) is push:
                        state.pushes[room_id] = state.pushes.pop(room_id)
                    state.gets_on()
                    return batch
            return None
        finally:
            self._schedule(destination)

    async def _adopt(self, destination: str) -> None:
        """Takes over what Synapse noted as missed by the destination."""
        for room_id, position in await self._storage.backlog(destination):
            state = self._destinations.get(destination)
            push = state.pushes.get(room_id) if state else None
            if push is None:
                self._add(destination, room_id, position=position, watch_until_ms=0)
            elif position < push.base:
                push.lower(position)

    async def _batch_of(self, push: Push, limit: int) -> Batch | None:
        await self._look(push)
        if not await self._rooms.may_receive(push.room_id, push.destination):
            if await self._rooms.is_in_room(push.room_id):
                logger.info("%s may not get events of %s now", push.destination, push.room_id)
                await self._drop(push)
            elif not push.held:
                # It may come back while the events are sticky.
                logger.info("%s is not in %s now", self._hs.server_name, push.room_id)
                push.held = True
            return None
        push.held = False
        self._update(push)
        if not push.open and push.start_over():
            logger.info("%s pruned events of %s, sending all again", push.destination, push.room_id)
            self._update(push)
        if not push.open:
            await self._settle(push)
            return None
        await self._skip_erased(push)
        event_ids = push.choose(limit, self._hs.now_ms())
        if not event_ids:
            return None
        return Batch(push.room_id, push.base - 1, event_ids)

    async def _look(self, push: Push) -> None:
        """Asks the database, if need be, up to where there is something of the room: this process
        may see it later than the join."""
        now_ms, missed = self._hs.now_ms(), push.missed
        if push.is_outdated(now_ms):
            push.look(await self._hs.stream.last_rows(push.room_id), missed, now_ms)

    async def _skip_erased(self, push: Push) -> None:
        own = self._own_events(push)
        erased = await self._rooms.erased({sender for _, _, sender in own})
        push.skip((position, event_id) for position, event_id, sender in own if sender in erased)

    def _update(self, push: Push) -> None:
        now_ms = self._hs.now_ms()
        pushing = len(self._index.servers_in_room(push.room_id, now_ms))
        window = max(1, self._config.window // max(1, pushing))
        push.update(self._own_events(push), now_ms, window)

    def _own_events(self, push: Push) -> list[tuple[int, str, str]]:
        now_ms = self._hs.now_ms()
        return self._index.own_events(push.room_id, push.position, now_ms, _ALL)

    async def _settle(self, push: Push) -> None:
        """Nothing is due. The push ends unless there is something to watch for."""
        now_ms = self._hs.now_ms()
        if (
            push.is_outdated(now_ms)
            or not self._follower.in_step()
            or not self._follower.has_taken_in(push.last_rows)
        ):
            return  # the index may yet bring something, or the database has to be asked again
        watched = now_ms < push.watch_until_ms
        if push.delivered:
            logger.info(
                "%s has the %d own sticky events of %s",
                push.destination,
                push.delivered,
                push.room_id,
            )
        push.settle()
        await self._end(push, still_watched=watched)

    async def _drop(self, push: Push) -> None:
        await self._end(push, still_watched=False)

    async def _end(self, push: Push, *, still_watched: bool) -> None:
        if not self._is_current(push):
            return  # the server has joined anew meanwhile
        if not still_watched:
            self._forget(push)
        await self._storage.settle(
            push.destination,
            push.room_id,
            push.position,
            watch_until_ms=push.recorded_watch_until_ms,
            still_watched=still_watched,
        )

    def _forget(self, push: Push) -> None:
        state = self._destinations[push.destination]
        del state.pushes[push.room_id]
        if not state.pushes:
            del self._destinations[push.destination]
            state.cancel_timer()

    def _caught_up(self, destination: str) -> None:
        """Synapse skipped events on the way to the destination, and noted that: what was sent up
        to now need not have gone by the ordinary queue."""
        state = self._destinations.get(destination)
        for push in list(state.pushes.values()) if state else []:
            push.missed += 1
            self._update(push)

    def _noted(self, destination: str) -> None:
        state = self._destinations.get(destination)
        for push in state.pushes.values() if state else ():
            push.noted(self._hs.now_ms())
        self._schedule(destination)

    def _new_events(self, rooms: Collection[str]) -> None:
        for destination, state in list(self._destinations.items()):
            touched = [p for room_id, p in state.pushes.items() if room_id in rooms]
            for push in touched:
                self._update(push)
            if touched:
                self._schedule(destination)

    def _schedule(self, destination: str) -> None:
        """Sets the destination's timer to when something is due, a watch ends, or a push that is
        not settled is to be looked at again."""
        state = self._destinations.get(destination)
        if state is None:
            return
        now_ms = self._hs.now_ms()
        times = [p.next_due_ms(now_ms) for p in state.pushes.values()]
        times += [
            max(p.watch_until_ms if p.settled else 0, state.next_nudge_ms)
            for p in state.pushes.values()
            if not p.open
        ]
        due_ms = min((t for t in times if t is not None), default=now_ms + _NUDGE_MAX_MS)
        self._nudge_in(max(due_ms - now_ms, 0) + 1, destination, state)

    def _nudge_in(self, delay_ms: int, destination: str, state: _Destination) -> None:
        state.cancel_timer()
        state.timer = self._hs.call_later(delay_ms, "nudge", self._nudge, destination)

    async def _nudge(self, destination: str) -> None:
        """Has Synapse ask for a batch, unless the destination is backed off until later."""
        state = self._destinations.get(destination)
        if state is None:
            return
        # If Synapse does not ask (it is busy sending, or backed off), try again later.
        delay_ms = state.nudge_ms
        try:
            await self._end_expired(destination)
            delay_ms = max(
                delay_ms, await self._federation.retry_at_ms(destination) - self._hs.now_ms()
            )
        finally:
            if self._destinations.get(destination) is state:
                state.nudge_ms = min(state.nudge_ms * 2, _NUDGE_MAX_MS)
                state.next_nudge_ms = self._hs.now_ms() + delay_ms
                self._nudge_in(delay_ms, destination, state)
        if destination not in self._destinations:
            return
        self._federation.wake(destination)
        # One that cannot be reached is not asked for a batch, and what is sent to it meanwhile is
        # the ordinary queue's: without a look all of it would be due.
        for push in list(state.pushes.values()):
            await self._look(push)

    async def _end_expired(self, destination: str) -> None:
        """Ends pushes that nothing is left of, for a destination that cannot be reached is never
        asked for a batch."""
        state = self._destinations.get(destination)
        now_ms = self._hs.now_ms()
        for push in list(state.pushes.values()) if state else []:
            if push.watch_until_ms < now_ms - MAX_STICKY_DURATION_MS:
                await self._look(push)
                self._update(push)
                if not push.open:
                    await self._settle(push)

    # Acknowledgements

    async def _acknowledged(self, destination: str, events: Sequence[tuple[str, str]]) -> None:
        state = self._destinations.get(destination)
        if state is None:
            return
        now_ms = self._hs.now_ms()
        rooms = {room_id for room_id, _ in events}
        for push in [p for room_id, p in state.pushes.items() if room_id in rooms]:
            self._update(push)
            for room_id, event_id in events:
                if room_id != push.room_id or not push.acknowledge(event_id, now_ms):
                    continue
                if not self._config.confirm:
                    push.done(event_id)
                elif not push.confirming:
                    push.confirming = True
                    self._hs.in_background("confirm", self._confirm, push)
        self._schedule(destination)

    def _is_current(self, push: Push) -> bool:
        state = self._destinations.get(push.destination)
        return state is not None and state.pushes.get(push.room_id) is push

    async def _confirm(self, push: Push) -> None:
        """Asks the newcomer for what it acknowledged, oldest first, until it has all of it."""
        delay_ms = _CONFIRM_MIN_MS
        try:
            # What was acknowledged this moment is not processed yet.
            await self._hs.sleep_ms(delay_ms)
            while self._is_current(push) and (waiting := push.unconfirmed()):
                if await self._confirm_one(push, waiting):
                    delay_ms = _CONFIRM_MIN_MS
                    if push.worth_sending(self._hs.now_ms()):
                        self._federation.wake(push.destination)
                    continue
                await self._hs.sleep_ms(delay_ms)
                delay_ms = min(delay_ms * 2, _CONFIRM_MAX_MS)
                self._update(push)
        finally:
            push.confirming = False
            if (state := self._destinations.get(push.destination)) is not None:
                state.gets_on()
            self._schedule(push.destination)

    async def _confirm_one(self, push: Push, waiting: list[Sent]) -> bool:
        """Asks for the oldest of the waiting events; is anything decided?"""
        if push.held:
            return False  # the newcomer tells nothing to who is not in the room
        oldest, newest = waiting[0], waiting[-1]
        answer = await self._federation.has_event(push.destination, oldest.event_id)
        if answer is Possession.REFUSES:
            oldest.refused += 1
            # No answer will come: the acknowledgement has to do.
            answer = Possession.HAS if oldest.refused >= _REFUSALS_TO_BELIEVE else answer
        if answer is Possession.HAS:
            push.has(oldest.event_id, self._hs.now_ms())
            return True
        if answer is Possession.UNREACHABLE:
            push.doubt()
        if answer is not Possession.LACKS:
            return False
        if newest is not oldest and (
            await self._federation.has_event(push.destination, newest.event_id) is Possession.HAS
        ):
            push.has(newest.event_id, self._hs.now_ms())
        # A newcomer takes staged events in order: if it has a later one, this one was pruned.
        # Once is not enough, as events that arrived together have no order.
        oldest.passed += push.overtaken(oldest)
        now_ms = self._hs.now_ms()
        waited_ms = now_ms - (oldest.acknowledged_ms or now_ms)
        if oldest.passed >= 2 or waited_ms > CONFIRM_PATIENCE_MS:
            push.lost(oldest, now_ms)
            return True
        return False
