//! The sticky events of all rooms, in stream order, in memory: for /sync, the federation sender and the join handler.
//!
//! It is a pure data structure; time is an argument. Every answer leaves out expired rows at once.
//! [`StickyIndex::expire`] drops them later, a few at a time. A row costs less than 200 bytes beyond its event ID, and
//! at most about 350 if every row comes from a user on a different server. The index keeps each name of a room, sender,
//! server or writer once.
//!
//! Every order below is a B-tree set of plain numbers, the most significant first, with the row's number last. So the
//! index keeps and finds both of two rows that share a stream ID, in either order. (Synapse's single sequence rules
//! that out.)

mod present;
mod query;
mod range;
mod servers;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroI64;

pub use present::{Most, Present};
pub use query::{RoomEvents, Rooms};
pub use range::{Position, Range};

use crate::error::Error;
use servers::Tally;
use store::{EventId, Interner, Names, Slab};

/// A sticky event to insert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewRow<'a> {
    /// Its position in the sticky events stream, unique across writers.
    pub stream_id: i64,
    /// The writer that assigned that position.
    pub instance_name: &'a str,
    /// The room it is in.
    pub room_id: &'a str,
    /// The event.
    pub event_id: &'a str,
    /// The user who sent it.
    pub sender: &'a str,
    /// When it stops being sticky, in ms since the Unix epoch (S2).
    pub expires_at_ms: i64,
    /// What it is the state of, hashed; `None` if that cannot be read.
    pub key: Option<i64>,
    /// The end that its sender claims, in ms since the Unix epoch: not before `expires_at_ms`.
    pub newness_ms: i64,
    /// The size of its JSON.
    pub size_bytes: u32,
}

/// A sticky event that a query found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// Its position in the sticky events stream.
    pub stream_id: i64,
    /// The room it is in.
    pub room_id: &'a str,
    /// The event.
    pub event_id: &'a str,
    /// The user who sent it.
    pub sender: &'a str,
    /// When it stops being sticky, in ms since the Unix epoch (S2).
    pub expires_at_ms: i64,
}

/// A row as the index keeps it, in 96 bytes. The interners gave the numbers.
#[derive(Debug)]
struct Row {
    stream_id: i64,
    expires_at_ms: i64,
    /// The hash 0 counts as none.
    key: Option<NonZeroI64>,
    event_id: EventId,
    /// By how much the claimed end is later than the true one, in ms: 49 days at most.
    ahead_ms: u32,
    size_bytes: u32,
    room: u32,
    sender: u32,
    server: u32,
    instance: u32,
}

/// (stream ID or time, row), in order.
type ByNumber = BTreeSet<[u32; 3]>;
/// (room, stream ID, row), in order.
type ByRoom = BTreeSet<[u32; 4]>;

/// Unexpired sticky events by room, in stream order. See the module's documentation.
#[derive(Debug)]
pub struct StickyIndex {
    own_server: Box<str>,
    rows: Slab<Row>,
    rooms: Interner,
    senders: Interner,
    servers: Interner,
    instances: Interner,
    by_event: Names,
    by_stream: ByNumber,
    by_expiry: ByNumber,
    by_room: ByRoom,
    /// The rows of [`Self::by_room`] that this server's users sent. The rows of other servers cost nothing here,
    /// however many a room has (P3, P4).
    own_by_room: ByRoom,
    /// By (room, server).
    tallies: BTreeMap<(u32, u32), Tally>,
    positions: BTreeMap<String, i64>,
}

impl StickyIndex {
    /// Creates an empty index. An event is this server's own if the domain of its sender is `own_server`.
    #[must_use]
    pub fn new(own_server: &str) -> Self {
        Self {
            own_server: own_server.into(),
            rows: Slab::new(),
            rooms: Interner::new(),
            senders: Interner::new(),
            servers: Interner::new(),
            instances: Interner::new(),
            by_event: Names::default(),
            by_stream: BTreeSet::new(),
            by_expiry: BTreeSet::new(),
            by_room: BTreeSet::new(),
            own_by_room: BTreeSet::new(),
            tallies: BTreeMap::new(),
            positions: BTreeMap::new(),
        }
    }

    /// Inserts a row. If the index already has a row of the event, the row with the higher stream ID stays. So the
    /// caller may insert rows again, in any order.
    ///
    /// # Errors
    /// [`Error::Full`] at 2^32 - 1 rows.
    pub fn insert(&mut self, new: NewRow<'_>) -> Result<(), Error> {
        if let Some(number) = self.number_of(new.event_id) {
            if new.stream_id <= self.rows.get(number).stream_id {
                return Ok(());
            }
            self.drop_row(number);
        }
        // The interners never have more names than there are rows.
        if self.rows.is_full() {
            return Err(Error::Full);
        }
        let server = domain(new.sender);
        let row = Row {
            stream_id: new.stream_id,
            expires_at_ms: new.expires_at_ms,
            key: new.key.and_then(NonZeroI64::new),
            event_id: new.event_id.into(),
            ahead_ms: ahead_ms(&new),
            size_bytes: new.size_bytes,
            room: self.rooms.acquire(new.room_id),
            sender: self.senders.acquire(new.sender),
            server: self.servers.acquire(server),
            instance: self.instances.acquire(new.instance_name),
        };
        self.count_row(&row);
        let (stream_id, expires_at_ms, room) = (row.stream_id, row.expires_at_ms, row.room);
        let number = self.rows.add(row);
        self.by_event.add(new.event_id, number);
        self.by_stream.insert(number_key(stream_id, number));
        self.by_expiry.insert(number_key(expires_at_ms, number));
        self.by_room.insert(room_key(room, stream_id, number));
        if *server == *self.own_server {
            self.own_by_room.insert(room_key(room, stream_id, number));
        }
        Ok(())
    }

    /// Drops an event, such as a redacted one (S5). Returns whether the index had it.
    pub fn remove(&mut self, event_id: &str) -> bool {
        let number = self.number_of(event_id);
        if let Some(number) = number {
            self.drop_row(number);
        }
        number.is_some()
    }

    /// Drops the rows that have expired at `now_ms`, at most `max_rows` of them, the oldest expiry first. Returns how
    /// many it dropped.
    pub fn expire(&mut self, now_ms: i64, max_rows: usize) -> usize {
        let mut dropped = 0;
        while dropped < max_rows {
            match self.by_expiry.first() {
                Some(&[_, _, number]) if !self.rows.get(number).is_unexpired(now_ms) => {
                    self.drop_row(number);
                    dropped += 1;
                }
                _ => break,
            }
        }
        dropped
    }

    /// Notes that the caller has inserted every row of this writer up to and including `stream_id`. The position never
    /// goes back.
    pub fn advance(&mut self, instance_name: &str, stream_id: i64) {
        match self.positions.get_mut(instance_name) {
            Some(position) => *position = stream_id.max(*position),
            None => {
                self.positions.insert(instance_name.to_owned(), stream_id);
            }
        }
    }

    /// The position of each writer that [`Self::advance`] has named.
    #[must_use]
    pub const fn positions(&self) -> &BTreeMap<String, i64> {
        &self.positions
    }

    /// Whether the index has reached each of these positions. A writer that [`Self::advance`] has not named is at 0.
    pub fn in_step<'a>(&self, positions: impl IntoIterator<Item = (&'a str, i64)>) -> bool {
        positions
            .into_iter()
            .all(|(writer, wanted)| wanted <= self.positions.get(writer).copied().unwrap_or(0))
    }

    /// How many rows the index has, with the expired ones that it has not dropped yet.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether the index has no row.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn number_of(&self, event_id: &str) -> Option<u32> {
        self.by_event
            .find(event_id, |number| self.rows.get(number).event_id.as_str())
    }

    fn drop_row(&mut self, number: u32) {
        let row = self.rows.remove(number);
        let in_room = room_key(row.room, row.stream_id, number);
        self.by_event.remove(row.event_id.as_str(), number);
        self.by_stream.remove(&number_key(row.stream_id, number));
        self.by_expiry
            .remove(&number_key(row.expires_at_ms, number));
        self.by_room.remove(&in_room);
        self.own_by_room.remove(&in_room);
        self.discount_row(&row);
        self.rooms.release(row.room);
        self.senders.release(row.sender);
        self.servers.release(row.server);
        self.instances.release(row.instance);
    }
}

fn ahead_ms(new: &NewRow<'_>) -> u32 {
    let ahead_ms = new.newness_ms.saturating_sub(new.expires_at_ms).max(0);
    u32::try_from(ahead_ms).unwrap_or(u32::MAX)
}

/// The server of a user ID: what follows the first colon. A string without a colon belongs to no server: empty.
fn domain(user_id: &str) -> &str {
    user_id.split_once(':').map_or("", |(_, domain)| domain)
}

/// Splits `number` into two halves that sort as `number` does.
const fn halves(number: i64) -> [u32; 2] {
    let sortable = (number as u64) ^ (1 << 63);
    [(sortable >> 32) as u32, sortable as u32]
}

const fn number_key(number: i64, row: u32) -> [u32; 3] {
    let [high, low] = halves(number);
    [high, low, row]
}

const fn room_key(room: u32, stream_id: i64, row: u32) -> [u32; 4] {
    let [high, low] = halves(stream_id);
    [room, high, low, row]
}

/// All keys of a room with stream IDs from `first` to `last`, both inclusive.
const fn room_span(room: u32, first: i64, last: i64) -> std::ops::RangeInclusive<[u32; 4]> {
    room_key(room, first, 0)..=room_key(room, last, u32::MAX)
}
