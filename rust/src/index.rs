//! The sticky events of all rooms, in stream order, in memory: what /sync, the federation sender and the join handler ask for.
//!
//! A pure data structure; time is an argument. Rows that have expired are left out of every answer at once, and really dropped by
//! [`StickyIndex::expire`], a few at a time. A row costs less than 200 bytes beyond its event ID, and at most some 350 if every row
//! comes from a user on a server of its own: the names of rooms, senders, servers and writers are kept once each.
//!
//! Every order below is a B-tree set of plain numbers, the most significant first, with the row's number last. So two rows that share
//! a stream ID, which Synapse's single sequence rules out, are both kept and both found, in either order.

mod query;
mod range;
mod store;

use std::collections::{BTreeMap, BTreeSet};

pub use query::{RoomEvents, Rooms};
pub use range::{Position, Range};

use crate::error::Error;
use store::{EventId, Interner, Names, Slab};

/// A sticky event, as it is inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewRow<'a> {
    /// Its position in the sticky events stream, unique across writers.
    pub stream_id: i64,
    /// The writer that gave it that position.
    pub instance_name: &'a str,
    /// The room it is in.
    pub room_id: &'a str,
    /// The event.
    pub event_id: &'a str,
    /// The user who sent it.
    pub sender: &'a str,
    /// When it stops being sticky, in ms since the Unix epoch (S2).
    pub expires_at_ms: i64,
}

/// A sticky event, as it is found.
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

/// A row as it is kept, in 80 bytes. The numbers are those of the interners.
#[derive(Debug)]
struct Row {
    stream_id: i64,
    expires_at_ms: i64,
    event_id: EventId,
    room: u32,
    sender: u32,
    server: u32,
    instance: u32,
}

/// What is known of one server's rows in one room, for [`StickyIndex::servers_in_room`].
#[derive(Debug)]
struct Tally {
    rows: u32,
    /// When the last of them expires, or later if `stale`.
    latest_ms: i64,
    /// The row that `latest_ms` came from is gone. It is worked out again when somebody asks, not at every removal: else redacting
    /// many events one by one would scan the room once for each.
    stale: bool,
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
    /// The rows of [`Self::by_room`] that this server's users sent: however many others a room has, they cost nothing here (P3, P4).
    own_by_room: ByRoom,
    /// By (room, server).
    tallies: BTreeMap<(u32, u32), Tally>,
    positions: BTreeMap<String, i64>,
}

impl StickyIndex {
    /// An empty index. An event is "own" if the domain of its sender is `own_server`.
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

    /// Takes a row in. If its event is there already, the row with the higher stream ID stays: rows can be read again, in any order.
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
            event_id: new.event_id.into(),
            room: self.rooms.acquire(new.room_id),
            sender: self.senders.acquire(new.sender),
            server: self.servers.acquire(server),
            instance: self.instances.acquire(new.instance_name),
        };
        let tally = self.tallies.entry((row.room, row.server)).or_insert(Tally {
            rows: 0,
            latest_ms: i64::MIN,
            stale: false,
        });
        tally.rows += 1;
        if row.expires_at_ms >= tally.latest_ms {
            tally.latest_ms = row.expires_at_ms;
            tally.stale = false;
        }
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

    /// Drops an event, such as one that was redacted (S5). Whether it was there.
    pub fn remove(&mut self, event_id: &str) -> bool {
        let number = self.number_of(event_id);
        if let Some(number) = number {
            self.drop_row(number);
        }
        number.is_some()
    }

    /// Drops all events of a room. How many there were. The only call whose cost has no bound but the size of a room.
    pub fn remove_room(&mut self, room_id: &str) -> usize {
        let Some(room) = self.rooms.find(room_id) else {
            return 0;
        };
        let numbers: Vec<u32> = self
            .by_room
            .range(room_span(room, i64::MIN, i64::MAX))
            .map(|key| key[3])
            .collect();
        for number in &numbers {
            self.drop_row(*number);
        }
        numbers.len()
    }

    /// Drops at most `max_rows` of the rows that have expired at `now_ms`, the oldest expiry first. How many they were.
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

    /// Says that every row of this writer up to and including `stream_id` has been taken in. Never goes back.
    pub fn advance(&mut self, instance_name: &str, stream_id: i64) {
        match self.positions.get_mut(instance_name) {
            Some(position) => *position = stream_id.max(*position),
            None => {
                self.positions.insert(instance_name.to_owned(), stream_id);
            }
        }
    }

    /// Up to where each writer has been taken in.
    #[must_use]
    pub const fn positions(&self) -> &BTreeMap<String, i64> {
        &self.positions
    }

    /// Whether each of these writers has been taken in up to its position. One that [`Self::advance`] has not named is at 0.
    pub fn in_step<'a>(&self, positions: impl IntoIterator<Item = (&'a str, i64)>) -> bool {
        positions
            .into_iter()
            .all(|(writer, wanted)| wanted <= self.positions.get(writer).copied().unwrap_or(0))
    }

    /// How many rows there are, those that have expired but are not dropped yet among them.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no row.
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
        if let Some(tally) = self.tallies.get_mut(&(row.room, row.server)) {
            tally.rows -= 1;
            tally.stale |= tally.latest_ms == row.expires_at_ms;
            if tally.rows == 0 {
                self.tallies.remove(&(row.room, row.server));
            }
        }
        self.rooms.release(row.room);
        self.senders.release(row.sender);
        self.servers.release(row.server);
        self.instances.release(row.instance);
    }
}

/// The server of a user ID: what follows the first colon. Nothing for a string without one: it is nobody's.
fn domain(user_id: &str) -> &str {
    user_id.split_once(':').map_or("", |(_, domain)| domain)
}

/// `number` as two halves that sort as it does.
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
