//! The release itself: whose turn it is, and whether the limits admit it.

use std::hash::BuildHasher;

use super::schedule::Name;
use super::{ReleaseQueue, Share};
use crate::limiter::{Key, Limiter, Refusal, Scope};

/// One moment, by the clock and by the steady time that the schedules use.
#[derive(Clone, Copy)]
struct Moment {
    now_ms: i64,
    steady_ms: i64,
}

/// The result of a room's turn.
enum Turn {
    Released(Name),
    /// The limits admit nothing before this steady time.
    Sleeps(i64),
}

impl ReleaseQueue {
    /// Takes out the events that are released now, at most `max_events`, charges them, and returns their IDs in the
    /// order of release.
    pub fn take<S: BuildHasher>(
        &mut self,
        limiter: &mut Limiter<S>,
        now_ms: i64,
        max_events: usize,
    ) -> Vec<String> {
        let steady_ms = self.time.at(now_ms);
        // Both follow the same time, even if this call makes no decision.
        limiter.tick(now_ms);
        let moment = Moment { now_ms, steady_ms };
        let mut released = Vec::new();
        for room_id in self.schedule.wake(steady_ms) {
            self.counter += 1;
            self.schedule.ready(&room_id, self.counter);
        }
        while released.len() < max_events {
            let Some(room_id) = self.schedule.first().cloned() else {
                break;
            };
            match self.turn_of(&room_id, limiter, moment) {
                Turn::Released(event_id) => {
                    self.counter += 1;
                    self.schedule.ready(&room_id, self.counter);
                    self.take_out(&event_id, Some(self.counter));
                    released.push(event_id.to_string());
                }
                Turn::Sleeps(until_ms) => self.schedule.sleep(&room_id, until_ms),
            }
        }
        released
    }

    /// Releases one event of the room, of the server whose turn it is.
    fn turn_of<S: BuildHasher>(
        &mut self,
        room_id: &Name,
        limiter: &mut Limiter<S>,
        moment: Moment,
    ) -> Turn {
        let Some(room) = self.rooms.get_mut(room_id) else {
            return Turn::Sleeps(i64::MAX);
        };
        room.held_by = None;
        for server in room.schedule.wake(moment.steady_ms) {
            self.counter += 1;
            room.schedule.ready(&server, self.counter);
        }
        loop {
            let Some(server) = room.schedule.first().cloned() else {
                return Turn::Sleeps(room.schedule.next_wake_ms().unwrap_or(i64::MAX));
            };
            let servers = room.shares.len();
            let Some(share) = room.shares.get_mut(&server) else {
                room.schedule.remove(&server);
                continue;
            };
            let rooms = self.waiting.get(&server).map_or(1, |of| of.rooms);
            let through_ms = through_ms(limiter, share.events, rooms, servers);
            match share.turn(room_id, &server, limiter, moment, through_ms) {
                Ok(event_id) => {
                    self.held_servers.remove(&server);
                    self.counter += 1;
                    room.schedule.ready(&server, self.counter);
                    return Turn::Released(event_id);
                }
                Err((until_ms, Some(Scope::Room))) => {
                    room.held_by = Some(Scope::Room);
                    return Turn::Sleeps(until_ms);
                }
                Err((until_ms, scope)) => {
                    share.held_by = scope;
                    if scope == Some(Scope::Server) {
                        self.held_servers.insert(server.clone());
                    }
                    room.schedule.sleep(&server, until_ms);
                }
            }
        }
    }
}

impl Share {
    /// Gives the sender its places among those that are ready.
    pub(super) fn rank(&mut self, sender: &Name) {
        let Some(of_sender) = self.senders.get(sender) else {
            return;
        };
        if let Some(most_urgent) = of_sender.urgency() {
            self.schedule.ready(sender, most_urgent);
        }
        match of_sender.owed() {
            Some(expiring) => self.owed.ready(sender, expiring),
            None => self.owed.remove(sender),
        }
    }

    /// Takes the sender out.
    pub(super) fn forget(&mut self, sender: &Name) {
        self.senders.remove(sender);
        self.schedule.remove(sender);
        self.owed.remove(sender);
    }

    /// The sender with the earliest deadline. What is owed a turn counts if it might come too late otherwise.
    fn first(&self, safe_after_ms: i64) -> Option<Name> {
        let owed = self.owed.first_place();
        let at_risk = owed.filter(|((turn_by_ms, _), _)| *turn_by_ms <= safe_after_ms);
        let first = at_risk.into_iter().chain(self.schedule.first_place()).min();
        first.map(|(_, sender)| sender.clone())
    }

    /// The next event that the limits admit. Else the time until which no event is admitted, and the limit that the
    /// whole share has reached; `None` if each sender has reached its own.
    ///
    /// `through_ms`: in how long all that waits of the share is through.
    fn turn<S: BuildHasher>(
        &mut self,
        room_id: &str,
        server: &str,
        limiter: &mut Limiter<S>,
        moment: Moment,
        through_ms: i64,
    ) -> Result<Name, (i64, Option<Scope>)> {
        self.held_by = None;
        for sender in self.schedule.wake(moment.steady_ms) {
            self.rank(&sender);
        }
        let safe_after_ms = moment.now_ms.saturating_add(through_ms);
        loop {
            let Some(sender) = self.first(safe_after_ms) else {
                return Err((self.schedule.next_wake_ms().unwrap_or(i64::MAX), None));
            };
            let Some(of_sender) = self.senders.get_mut(&sender) else {
                self.forget(&sender);
                continue;
            };
            of_sender.pace_ms = if of_sender.is_exempt {
                0
            } else {
                limiter.interval_ms(Scope::Sender)
            };
            let Some((event_id, is_rescue)) = of_sender.next(safe_after_ms) else {
                self.forget(&sender);
                continue;
            };
            let charges = charges(server, room_id, &sender, of_sender.is_exempt);
            match limiter.admit(&charges, moment.now_ms) {
                Ok(()) => {
                    of_sender.chosen(is_rescue);
                    return Ok(event_id);
                }
                Err(Refusal {
                    scope,
                    retry_after_ms,
                }) => {
                    let until_ms = moment.steady_ms.saturating_add(retry_after_ms);
                    if scope != Scope::Sender {
                        return Err((until_ms, Some(scope)));
                    }
                    self.schedule.sleep(&sender, until_ms);
                    self.owed.remove(&sender);
                }
            }
        }
    }
}

/// What an event is charged to.
pub(super) fn charges<'a>(
    server: &'a str,
    room_id: &'a str,
    sender: &'a str,
    is_exempt: bool,
) -> Vec<(Key<'a>, u32)> {
    Key::of_event(server, room_id, sender)
        .into_iter()
        .filter(|key| !is_exempt || key.scope() != Scope::Sender)
        .map(|key| (key, 1))
        .collect()
}

/// In how long this many events of a server in a room are through, once bursts are used up. `rooms`: those that share
/// the server's own limit. `servers`: those that share the room's.
fn through_ms<S: BuildHasher>(
    limiter: &Limiter<S>,
    events: usize,
    rooms: usize,
    servers: usize,
) -> i64 {
    let of = |(scope, shared_by): (Scope, usize)| {
        let turns = i64::try_from(events.saturating_mul(shared_by)).unwrap_or(i64::MAX);
        limiter.interval_ms(scope).saturating_mul(turns)
    };
    let scopes = [
        (Scope::ServerInRoom, 1),
        (Scope::Server, rooms),
        (Scope::Room, servers),
    ];
    scopes.into_iter().map(of).max().unwrap_or(0)
}
