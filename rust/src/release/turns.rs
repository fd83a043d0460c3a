//! The release itself: whose turn it is, and whether the limits admit it.

use std::hash::BuildHasher;

use super::schedule::Name;
use super::sender::OfSender;
use super::{charges, ReleaseQueue, Share};
use crate::limiter::{Limiter, Refusal, Scope};

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
            let Some(share) = room.shares.get_mut(&server) else {
                room.schedule.remove(&server);
                continue;
            };
            match share.turn(room_id, &server, limiter, moment) {
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
    /// The next event that the limits admit. Else the time until which no event is admitted, and the limit that the
    /// whole share has reached; `None` if each sender has reached its own.
    fn turn<S: BuildHasher>(
        &mut self,
        room_id: &str,
        server: &str,
        limiter: &mut Limiter<S>,
        moment: Moment,
    ) -> Result<Name, (i64, Option<Scope>)> {
        self.held_by = None;
        for sender in self.schedule.wake(moment.steady_ms) {
            if let Some(most_urgent) = self.senders.get(&sender).and_then(OfSender::urgency) {
                self.schedule.ready(&sender, most_urgent);
            }
        }
        loop {
            let Some(sender) = self.schedule.first().cloned() else {
                return Err((self.schedule.next_wake_ms().unwrap_or(i64::MAX), None));
            };
            let at_least_ms = pace_ms(limiter, self.senders.len());
            let Some(of_sender) = self.senders.get_mut(&sender) else {
                self.schedule.remove(&sender);
                continue;
            };
            let Some((event_id, is_rescue)) = of_sender.next(moment.now_ms, at_least_ms) else {
                self.schedule.remove(&sender);
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
                }
            }
        }
    }
}

/// How long each of this many senders of a server in a room waits for its next turn at least, once bursts are used up.
fn pace_ms<S: BuildHasher>(limiter: &Limiter<S>, senders: usize) -> i64 {
    let senders = i64::try_from(senders).unwrap_or(i64::MAX);
    let of = |scope: Scope| {
        let shared_by = if scope == Scope::Sender { 1 } else { senders };
        limiter.interval_ms(scope).saturating_mul(shared_by)
    };
    let scopes = [
        Scope::Sender,
        Scope::ServerInRoom,
        Scope::Server,
        Scope::Room,
    ];
    scopes.into_iter().map(of).max().unwrap_or(0)
}
