//! Deferred events, and in which order they are released (L4, D7).
//!
//! Rooms take turns, the servers of a room take turns, and of one server's events in a room the one that expires first goes first.
//! Whoever a limit holds up sleeps until it would pass and does not stand in anybody's way: a server whose room-wide, or a sender
//! whose own allowance is used up leaves the turn to the others.

mod schedule;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::BuildHasher;

use crate::limiter::{Key, Limiter, Refusal, Scope};
use crate::steady::SteadyTime;
use schedule::{Name, Schedule};

/// An event that waits.
#[derive(Clone, Copy, Debug)]
pub struct Deferred<'a> {
    /// Its event ID.
    pub event_id: &'a str,
    /// The room that it is in.
    pub room_id: &'a str,
    /// The server of its sender.
    pub server: &'a str,
    /// Its sender's user ID.
    pub sender: &'a str,
    /// When it stops being sticky, in ms since the Unix epoch.
    pub expires_at_ms: i64,
}

/// What expires first goes first, and what came first of those that expire together.
type Urgency = (i64, u64);

struct Entry {
    room_id: Name,
    server: Name,
    sender: Name,
    urgency: Urgency,
}

/// One server's events in one room.
#[derive(Default)]
struct Share {
    senders: HashMap<Name, BTreeSet<(Urgency, Name)>>,
    schedule: Schedule<Urgency>,
    /// The limit that the whole share was last held up by, while it is.
    held_by: Option<Scope>,
}

#[derive(Default)]
struct Room {
    shares: HashMap<Name, Share>,
    schedule: Schedule<u64>,
    held_by: Option<Scope>,
}

/// One moment, by the clock and by the steady time that sleepers go by.
#[derive(Clone, Copy)]
struct Moment {
    now_ms: i64,
    steady_ms: i64,
}

/// What came of a turn.
enum Turn {
    Released(Name),
    /// Nothing before this steady time.
    Sleeps(i64),
}

/// The events that wait, in the order of their release.
pub struct ReleaseQueue {
    entries: HashMap<Name, Entry>,
    expiry: BTreeSet<(i64, Name)>,
    rooms: HashMap<Name, Room>,
    schedule: Schedule<u64>,
    waiting: HashMap<Name, usize>,
    /// Servers that their limit over all rooms holds up.
    held_servers: HashSet<Name>,
    counter: u64,
    time: SteadyTime,
}

impl Default for ReleaseQueue {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            expiry: BTreeSet::new(),
            rooms: HashMap::new(),
            schedule: Schedule::default(),
            waiting: HashMap::new(),
            held_servers: HashSet::new(),
            counter: 0,
            time: SteadyTime::new(),
        }
    }
}

impl ReleaseQueue {
    /// An empty queue.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many events wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether this event waits.
    #[must_use]
    pub fn contains(&self, event_id: &str) -> bool {
        self.entries.contains_key(event_id)
    }

    /// How many events of this server wait.
    #[must_use]
    pub fn waiting(&self, server: &str) -> usize {
        self.waiting.get(server).copied().unwrap_or(0)
    }

    /// May a new event be delivered now, and is then paid for?
    ///
    /// It may not overtake what waits for the same allowance: else new events could take each of its drops, and what waits would
    /// do so until it expires. Those whose turn has come and who have not been asked yet what holds them up have one event's
    /// allowance each kept for them.
    ///
    /// # Errors
    ///
    /// The limit in its way: it is to be deferred.
    pub fn admit<S: BuildHasher>(
        &self,
        limiter: &mut Limiter<S>,
        room_id: &str,
        server: &str,
        sender: &str,
        now_ms: i64,
    ) -> Result<(), Scope> {
        if let Some(scope) = self.waits_behind(room_id, server, sender) {
            return Err(scope);
        }
        for (key, kept) in self.kept_for_others(room_id, server) {
            if !limiter.has(key, kept + 1, now_ms) {
                return Err(key.scope());
            }
        }
        limiter
            .admit(
                &Key::of_event(server, room_id, sender).map(|k| (k, 1)),
                now_ms,
            )
            .map_err(|refusal| refusal.scope)
    }

    fn waits_behind(&self, room_id: &str, server: &str, sender: &str) -> Option<Scope> {
        if self.held_servers.contains(server) {
            return Some(Scope::Server);
        }
        let room = self.rooms.get(room_id)?;
        if let Some(scope) = room.held_by {
            return Some(scope);
        }
        if let Some(share) = room.shares.get(server) {
            if let Some(scope) = share.held_by {
                return Some(scope);
            }
            if share.senders.contains_key(sender) {
                return Some(Scope::Sender);
            }
        }
        None
    }

    /// How many events' allowance new ones must leave to those whose turn has come.
    fn kept_for_others<'a>(&self, room_id: &'a str, server: &'a str) -> Vec<(Key<'a>, u32)> {
        let Some(room) = self.rooms.get(room_id) else {
            return Vec::new();
        };
        let count = |ready: usize| u32::try_from(ready).unwrap_or(u32::MAX - 1);
        let senders = room
            .shares
            .get(server)
            .map_or(0, |share| count(share.schedule.count_ready()));
        vec![
            (Key::Room(room_id), count(room.schedule.count_ready())),
            (Key::ServerInRoom(server, room_id), senders),
            (Key::Server(server), senders),
        ]
    }

    /// Has the event wait; false if it does already.
    pub fn add(&mut self, event: Deferred<'_>) -> bool {
        if self.entries.contains_key(event.event_id) {
            return false;
        }
        self.counter += 1;
        let turn = self.counter;
        let urgency = (event.expires_at_ms, turn);
        let event_id = Name::from(event.event_id);
        let room_id = known(&self.rooms, event.room_id);
        let server = known(&self.waiting, event.server);

        let room = self.rooms.entry(room_id.clone()).or_default();
        let share = room.shares.entry(server.clone()).or_default();
        let sender = known(&share.senders, event.sender);
        let waiting = share.senders.entry(sender.clone()).or_default();
        waiting.insert((urgency, event_id.clone()));
        if waiting.len() == 1 {
            share.schedule.ready(&sender, urgency);
            // A new sender may be let through where the others of its server are held up, each by itself.
            if share.held_by.is_none() && !room.schedule.is_ready(&server) {
                room.schedule.ready(&server, turn);
            }
            if room.held_by.is_none() && !self.schedule.is_ready(&room_id) {
                self.schedule.ready(&room_id, turn);
            }
        } else if share.schedule.is_ready(&sender) {
            if let Some((most_urgent, _)) = waiting.first() {
                share.schedule.ready(&sender, *most_urgent);
            }
        }

        *self.waiting.entry(server.clone()).or_default() += 1;
        self.expiry.insert((event.expires_at_ms, event_id.clone()));
        self.entries.insert(
            event_id,
            Entry {
                room_id,
                server,
                sender,
                urgency,
            },
        );
        true
    }

    /// Takes the event out; false if it does not wait.
    pub fn remove(&mut self, event_id: &str) -> bool {
        let Some((event_id, entry)) = self.entries.remove_entry(event_id) else {
            return false;
        };
        self.expiry.remove(&(entry.urgency.0, event_id.clone()));
        if let Some(waiting) = self.waiting.get_mut(&entry.server) {
            *waiting -= 1;
            if *waiting == 0 {
                self.waiting.remove(&entry.server);
                self.held_servers.remove(&entry.server);
            }
        }
        let Some(room) = self.rooms.get_mut(&entry.room_id) else {
            return true;
        };
        let Some(share) = room.shares.get_mut(&entry.server) else {
            return true;
        };
        if let Some(of_sender) = share.senders.get_mut(&entry.sender) {
            of_sender.remove(&(entry.urgency, event_id));
            match of_sender.first() {
                None => {
                    share.senders.remove(&entry.sender);
                    share.schedule.remove(&entry.sender);
                }
                Some((most_urgent, _)) if share.schedule.is_ready(&entry.sender) => {
                    share.schedule.ready(&entry.sender, *most_urgent);
                }
                Some(_) => {}
            }
        }
        if share.senders.is_empty() {
            room.shares.remove(&entry.server);
            room.schedule.remove(&entry.server);
        }
        if room.shares.is_empty() {
            self.rooms.remove(&entry.room_id);
            self.schedule.remove(&entry.room_id);
        }
        true
    }

    /// Takes out what may be released now, at most `max_events`, in the order of release. It is paid for.
    pub fn take<S: BuildHasher>(
        &mut self,
        limiter: &mut Limiter<S>,
        now_ms: i64,
        max_events: usize,
    ) -> Vec<String> {
        let steady_ms = self.time.at(now_ms);
        limiter.tick(now_ms); // the same time for both, though no decision is made
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
                    self.remove(&event_id);
                    released.push(event_id.to_string());
                }
                Turn::Sleeps(until_ms) => self.schedule.sleep(&room_id, until_ms),
            }
        }
        released
    }

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

    /// Takes out what has expired, at most `max_events`.
    pub fn expire(&mut self, now_ms: i64, max_events: usize) -> Vec<String> {
        let expired: Vec<Name> = self
            .expiry
            .iter()
            .take_while(|(expires_at_ms, _)| *expires_at_ms <= now_ms)
            .take(max_events)
            .map(|(_, event_id)| event_id.clone())
            .collect();
        for event_id in &expired {
            self.remove(event_id);
        }
        expired.iter().map(ToString::to_string).collect()
    }

    /// When there may be something to release or to expire, in ms since the Unix epoch; `now_ms` at the earliest, None if nothing
    /// waits.
    #[must_use]
    pub fn next_due_ms(&self, now_ms: i64) -> Option<i64> {
        if self.schedule.first().is_some() {
            return Some(now_ms);
        }
        let expires_at_ms = self.expiry.first().map(|(expires_at_ms, _)| *expires_at_ms);
        let steady_ms = self.time.clone().at(now_ms);
        let wakes_ms = self
            .schedule
            .next_wake_ms()
            .map(|until_ms| now_ms.saturating_add(until_ms.saturating_sub(steady_ms)));
        let due_ms = wakes_ms.into_iter().chain(expires_at_ms).min();
        due_ms.map(|due_ms| due_ms.max(now_ms))
    }
}

impl Share {
    /// The next event that is let through, or until when and by what the whole share is held up (None: each sender by itself).
    fn turn<S: BuildHasher>(
        &mut self,
        room_id: &str,
        server: &str,
        limiter: &mut Limiter<S>,
        moment: Moment,
    ) -> Result<Name, (i64, Option<Scope>)> {
        self.held_by = None;
        for sender in self.schedule.wake(moment.steady_ms) {
            if let Some((most_urgent, _)) = self.senders.get(&sender).and_then(BTreeSet::first) {
                self.schedule.ready(&sender, *most_urgent);
            }
        }
        loop {
            let Some(sender) = self.schedule.first().cloned() else {
                return Err((self.schedule.next_wake_ms().unwrap_or(i64::MAX), None));
            };
            let Some((_, event_id)) = self.senders.get(&sender).and_then(BTreeSet::first) else {
                self.schedule.remove(&sender);
                continue;
            };
            let charges = Key::of_event(server, room_id, &sender).map(|key| (key, 1));
            match limiter.admit(&charges, moment.now_ms) {
                Ok(()) => return Ok(event_id.clone()),
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

/// The name as it is known already, so that each is kept once.
fn known<V>(names: &HashMap<Name, V>, name: &str) -> Name {
    names
        .get_key_value(name)
        .map_or_else(|| Name::from(name), |(known, _)| known.clone())
}
