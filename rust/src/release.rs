//! Deferred events, and the order of their release (L4, D7).
//!
//! Rooms take turns. The servers of a room take turns. A server's turn in a room goes to the sender who has the
//! earliest deadline, and of that sender's events to the newest state (see [`sender`]). A server that has reached its
//! own limit is skipped. The same goes for a sender and for a room. Whatever is skipped sleeps until its limit would
//! admit the next event, and delays no others.

mod schedule;
mod sender;
mod turns;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::BuildHasher;

use crate::limiter::{Key, Limiter, Scope};
use crate::steady::SteadyTime;
use schedule::{Name, Schedule};
use sender::OfSender;
use turns::charges;

/// A deferred event.
#[derive(Clone, Copy, Debug)]
pub struct Deferred<'a> {
    /// The event's ID.
    pub event_id: &'a str,
    /// The room that the event is in.
    pub room_id: &'a str,
    /// The server of the sender.
    pub server: &'a str,
    /// The user who sent the event.
    pub sender: &'a str,
    /// When the event stops being sticky, in ms since the Unix epoch (S2).
    pub expires_at_ms: i64,
    /// What the event is the state of, hashed; `None` if that cannot be read. It counts per sender and room.
    pub key: Option<i64>,
    /// The end that the sender claims, in ms since the Unix epoch. Of a key, the event with the latest is the newest.
    pub newness_ms: i64,
    /// The limit on a sender does not apply.
    pub is_exempt: bool,
}

/// The order of a sender's events: by expiry, and by arrival if they expire together.
type Urgency = (i64, u64);

struct Entry {
    room_id: Name,
    server: Name,
    sender: Name,
    urgency: Urgency,
    key: Option<i64>,
    newness_ms: i64,
}

/// One server's deferred events in one room.
#[derive(Default)]
struct Share {
    senders: HashMap<Name, OfSender>,
    events: usize,
    schedule: Schedule<Urgency>,
    /// Of the senders that are ready, those with an event that is owed a turn, by when it must have it.
    owed: Schedule<Urgency>,
    /// The limit that the whole share has reached, if any.
    held_by: Option<Scope>,
}

/// A room's deferred events.
#[derive(Default)]
struct Room {
    shares: HashMap<Name, Share>,
    schedule: Schedule<u64>,
    /// The limit that the whole room has reached, if any.
    held_by: Option<Scope>,
}

/// What is deferred of a server.
#[derive(Default)]
struct OfServer {
    events: usize,
    rooms: usize,
}

/// The deferred events, in the order of their release.
pub struct ReleaseQueue {
    entries: HashMap<Name, Entry>,
    expiry: BTreeSet<(i64, Name)>,
    rooms: HashMap<Name, Room>,
    schedule: Schedule<u64>,
    waiting: HashMap<Name, OfServer>,
    /// The servers that have reached their limit over all rooms.
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
    /// Creates an empty queue.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many events are deferred.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no event is deferred.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether this event is deferred.
    #[must_use]
    pub fn contains(&self, event_id: &str) -> bool {
        self.entries.contains_key(event_id)
    }

    /// How many events of this server are deferred.
    #[must_use]
    pub fn waiting(&self, server: &str) -> usize {
        self.waiting.get(server).map_or(0, |of| of.events)
    }

    /// Charges a new event and admits it, if it may be delivered now.
    ///
    /// A new event may not overtake a deferred event that needs the same allowance. Else new events could use up the
    /// whole allowance, and deferred events would stay deferred until they expire. A sender or server whose turn has
    /// come may not have tried its limits yet. New events leave the allowance of one event to each of these.
    ///
    /// `is_exempt`: the limit on a sender does not apply. So the sender's own deferred events hold up no new ones.
    ///
    /// # Errors
    /// The limit that refused the event. The caller must defer it.
    pub fn admit<S: BuildHasher>(
        &self,
        limiter: &mut Limiter<S>,
        room_id: &str,
        server: &str,
        sender: &str,
        is_exempt: bool,
        now_ms: i64,
    ) -> Result<(), Scope> {
        if let Some(scope) = self.waits_behind(room_id, server, sender, is_exempt) {
            return Err(scope);
        }
        for (key, kept) in self.kept_for_others(room_id, server) {
            if !limiter.has(key, kept + 1, now_ms) {
                return Err(key.scope());
            }
        }
        limiter
            .admit(&charges(server, room_id, sender, is_exempt), now_ms)
            .map_err(|refusal| refusal.scope)
    }

    /// The limit for which a deferred event would come before this new one, if any.
    fn waits_behind(
        &self,
        room_id: &str,
        server: &str,
        sender: &str,
        is_exempt: bool,
    ) -> Option<Scope> {
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
            if !is_exempt && share.senders.contains_key(sender) {
                return Some(Scope::Sender);
            }
        }
        None
    }

    /// The allowance that new events must leave to those whose turn has come, in events by key.
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

    /// Defers the event. Returns false if it is deferred already.
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
        let of_server = self.waiting.entry(server.clone()).or_default();
        of_server.events += 1;
        of_server.rooms += usize::from(share.events == 0);
        share.events += 1;
        let sender = known(&share.senders, event.sender);
        let entry = Entry {
            room_id: room_id.clone(),
            server: server.clone(),
            sender: sender.clone(),
            urgency,
            key: event.key,
            newness_ms: event.newness_ms,
        };
        let of_sender = share.senders.entry(sender.clone()).or_default();
        let is_first = of_sender.is_empty();
        of_sender.is_exempt = event.is_exempt;
        of_sender.add(&event_id, &entry);
        if is_first || share.schedule.is_ready(&sender) {
            share.rank(&sender);
        }
        if is_first {
            // The other senders of the server may have reached their own limits. The new sender has not.
            if share.held_by.is_none() && !room.schedule.is_ready(&server) {
                room.schedule.ready(&server, turn);
            }
            if room.held_by.is_none() && !self.schedule.is_ready(&room_id) {
                self.schedule.ready(&room_id, turn);
            }
        }

        self.expiry.insert((event.expires_at_ms, event_id.clone()));
        self.entries.insert(event_id, entry);
        true
    }

    /// Takes the event out. Returns false if it is not deferred.
    pub fn remove(&mut self, event_id: &str) -> bool {
        self.take_out(event_id, None)
    }

    /// Takes the event out. `released_in`: the turn in which it was released; `None` if it is just gone.
    fn take_out(&mut self, event_id: &str, released_in: Option<u64>) -> bool {
        let Some((event_id, entry)) = self.entries.remove_entry(event_id) else {
            return false;
        };
        self.expiry.remove(&(entry.urgency.0, event_id.clone()));
        if let Some(of_server) = self.waiting.get_mut(&entry.server) {
            of_server.events -= 1;
            if of_server.events == 0 {
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
        share.events -= 1;
        if let Some(of_sender) = share.senders.get_mut(&entry.sender) {
            of_sender.remove(&event_id, &entry, released_in);
            if of_sender.is_empty() {
                share.forget(&entry.sender);
            } else if share.schedule.is_ready(&entry.sender) {
                share.rank(&entry.sender);
            }
        }
        if share.senders.is_empty() {
            if let Some(of_server) = self.waiting.get_mut(&entry.server) {
                of_server.rooms -= 1;
            }
            room.shares.remove(&entry.server);
            room.schedule.remove(&entry.server);
        }
        if room.shares.is_empty() {
            self.rooms.remove(&entry.room_id);
            self.schedule.remove(&entry.room_id);
        }
        true
    }

    /// Takes out the events that have expired, at most `max_events`, and returns their IDs.
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

    /// When there may be an event to release or to expire, in ms since the Unix epoch. `now_ms` at the earliest; `None`
    /// if no event is deferred.
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

/// The stored copy of the name if there is one, so that each name is stored once.
fn known<V>(names: &HashMap<Name, V>, name: &str) -> Name {
    names
        .get_key_value(name)
        .map_or_else(|| Name::from(name), |(known, _)| known.clone())
}
