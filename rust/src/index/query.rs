//! The queries of the index. They leave out exactly the expired rows, dropped or not.

use std::cmp::Reverse;
use std::collections::binary_heap::PeekMut;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::convert::Infallible;
use std::hash::BuildHasher;

use super::range::{Bounds, Range};
use super::{number_key, room_span, Found, Row, StickyIndex};
use crate::rules;

/// How many rows of the stream a query may scan for each room that it asks for. Beyond that, a search in each room is
/// cheaper. A row costs a step along a tree and a look at its room. A room costs a search by name and a search for the
/// first row.
const ROWS_PER_ROOM: usize = 4;

fn affordable_rows(rooms: &impl Rooms) -> usize {
    rooms.len().saturating_mul(ROWS_PER_ROOM)
}

/// A set of rooms. A query looks into it or iterates over it. Python's sets allow both without a copy.
pub trait Rooms {
    /// The error of a lookup or an iteration. [`Infallible`] for Rust's own sets.
    type Error;
    /// How many rooms the set has.
    fn len(&self) -> usize;
    /// Whether the set has no room.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Whether the set has `room_id`.
    ///
    /// # Errors
    /// The lookup failed.
    fn contains(&self, room_id: &str) -> Result<bool, Self::Error>;
    /// Calls `visit` with each room, once.
    ///
    /// # Errors
    /// The iteration failed.
    fn for_each(&self, visit: impl FnMut(&str)) -> Result<(), Self::Error>;
}

impl<S: BuildHasher> Rooms for HashSet<&str, S> {
    type Error = Infallible;

    fn len(&self) -> usize {
        Self::len(self)
    }

    fn contains(&self, room_id: &str) -> Result<bool, Infallible> {
        Ok(Self::contains(self, room_id))
    }

    fn for_each(&self, visit: impl FnMut(&str)) -> Result<(), Infallible> {
        self.iter().copied().for_each(visit);
        Ok(())
    }
}

/// Events by room.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoomEvents<'a> {
    /// Each room with its events in stream order. The rooms are in the order of their first events.
    pub rooms: Vec<(&'a str, Vec<&'a str>)>,
    /// How many events all rooms have together.
    pub count: usize,
    /// How many bytes the JSON of all these events has.
    pub bytes: usize,
    /// The stream ID of the last of all these events.
    pub last_stream_id: Option<i64>,
}

impl Row {
    pub(super) const fn is_unexpired(&self, now_ms: i64) -> bool {
        rules::is_unexpired(self.expires_at_ms, now_ms)
    }

    /// The end that the sender claims, in ms since the Unix epoch.
    pub(super) fn newness_ms(&self) -> i64 {
        self.expires_at_ms.saturating_add(self.ahead_ms.into())
    }

    /// The size of its JSON, in bytes.
    pub(super) const fn size(&self) -> usize {
        self.size_bytes as usize
    }
}

impl StickyIndex {
    /// The events of these rooms in this range that are unexpired at `now_ms`, by ascending stream ID, at most `limit`
    /// (D1, D2, D4).
    ///
    /// The cost follows the number of rooms or the number of rows in the range, whichever is smaller. If the range has
    /// no row, the query does not look into `rooms`.
    ///
    /// # Errors
    /// A look into `rooms` failed.
    pub fn events_in_rooms<R: Rooms>(
        &self,
        rooms: &R,
        range: &Range,
        now_ms: i64,
        limit: Option<usize>,
    ) -> Result<Vec<Found<'_>>, R::Error> {
        let rows = self.rows_in_rooms(rooms, range, now_ms, limit)?;
        Ok(rows.into_iter().map(|row| self.found(row)).collect())
    }

    /// The same events, by room. Without a limit this is cheaper, since it need not merge the rooms into one order.
    ///
    /// # Errors
    /// A look into `rooms` failed.
    pub fn events_by_room<R: Rooms>(
        &self,
        rooms: &R,
        range: &Range,
        now_ms: i64,
        limit: Option<usize>,
    ) -> Result<RoomEvents<'_>, R::Error> {
        if limit.is_none() {
            if let Some(found) = self.all_by_room(rooms, range, now_ms, usize::MAX)? {
                return Ok(found);
            }
        }
        Ok(self.by_room_of(self.rows_in_rooms(rooms, range, now_ms, limit)?))
    }

    /// The same without a limit; `None` if a scan of the stream is cheaper. It ends early, as it likes, once there are
    /// more than `enough`.
    pub(super) fn all_by_room<R: Rooms>(
        &self,
        rooms: &R,
        range: &Range,
        now_ms: i64,
        enough: usize,
    ) -> Result<Option<RoomEvents<'_>>, R::Error> {
        let Some(bounds) = Bounds::new(range, &self.instances) else {
            return Ok(None);
        };
        if !self.is_better_by_room(rooms, &bounds) {
            return Ok(None);
        }
        let mut asked = Vec::new();
        rooms.for_each(|name| asked.extend(self.rooms.find(name)))?;
        Ok(Some(self.each_by_room(&asked, &bounds, now_ms, enough)))
    }

    /// Rows that are in stream order, by room.
    pub(super) fn by_room_of<'a>(
        &'a self,
        rows: impl IntoIterator<Item = &'a Row>,
    ) -> RoomEvents<'a> {
        let mut places = HashMap::new();
        let mut found = RoomEvents::default();
        for row in rows {
            let place = *places.entry(row.room).or_insert_with(|| {
                found.rooms.push((self.rooms.get(row.room), Vec::new()));
                found.rooms.len() - 1
            });
            found.rooms[place].1.push(row.event_id.as_str());
            found.count += 1;
            found.bytes += row.size();
            found.last_stream_id = Some(row.stream_id);
        }
        found
    }

    /// The rows of [`Self::events_in_rooms`].
    pub(super) fn rows_in_rooms<R: Rooms>(
        &self,
        rooms: &R,
        range: &Range,
        now_ms: i64,
        limit: Option<usize>,
    ) -> Result<Vec<&Row>, R::Error> {
        let mut found = Vec::new();
        let Some(bounds) = Bounds::new(range, &self.instances) else {
            return Ok(found);
        };
        if limit == Some(0) || rooms.is_empty() {
            return Ok(found);
        }
        // With a limit, even a long stream may yield enough before it costs more than a search in each room.
        if limit.is_some() || !self.is_better_by_room(rooms, &bounds) {
            let mut stream = self.stream(&bounds);
            for number in stream.by_ref().take(affordable_rows(rooms)) {
                let row = self.rows.get(number);
                if bounds.contain(row.instance, row.stream_id)
                    && row.is_unexpired(now_ms)
                    && rooms.contains(self.rooms.get(row.room))?
                {
                    found.push(row);
                    if Some(found.len()) == limit {
                        return Ok(found);
                    }
                }
            }
            if stream.next().is_none() {
                return Ok(found);
            }
            found.clear();
        }
        let mut asked = Vec::new();
        rooms.for_each(|name| asked.extend(self.rooms.find(name)))?;
        let fits = |number| {
            let row = self.rows.get(number);
            (bounds.contain(row.instance, row.stream_id) && row.is_unexpired(now_ms)).then_some(row)
        };
        if let Some(limit) = limit {
            let merged = self.merged(&asked, &bounds);
            found.extend(merged.filter_map(fits).take(limit));
        } else {
            // To sort all of them is cheaper than to merge the rooms.
            let mut keys: Vec<_> = asked
                .iter()
                .flat_map(|room| {
                    self.by_room
                        .range(room_span(*room, bounds.first, bounds.last))
                })
                .map(|[_, in_room @ ..]| *in_room)
                .collect();
            keys.sort_unstable();
            found.extend(keys.into_iter().filter_map(|[_, _, number]| fits(number)));
        }
        Ok(found)
    }

    fn each_by_room(
        &self,
        rooms: &[u32],
        bounds: &Bounds,
        now_ms: i64,
        enough: usize,
    ) -> RoomEvents<'_> {
        let mut found = RoomEvents::default();
        let mut first_ids = Vec::new();
        for room in rooms {
            if found.count > enough {
                break;
            }
            let mut events = Vec::new();
            let mut first_id = None;
            let span = room_span(*room, bounds.first, bounds.last);
            for [_, _, _, number] in self.by_room.range(span) {
                let row = self.rows.get(*number);
                if bounds.contain(row.instance, row.stream_id) && row.is_unexpired(now_ms) {
                    first_id.get_or_insert(row.stream_id);
                    found.last_stream_id = found.last_stream_id.max(Some(row.stream_id));
                    found.bytes += row.size();
                    events.push(row.event_id.as_str());
                    if found.count + events.len() > enough {
                        break;
                    }
                }
            }
            if let Some(first_id) = first_id {
                found.count += events.len();
                first_ids.push((first_id, (self.rooms.get(*room), events)));
            }
        }
        first_ids.sort_by_key(|(first_id, _)| *first_id);
        found.rooms = first_ids.into_iter().map(|(_, room)| room).collect();
        found
    }

    /// Whether a search in each room is cheaper than a scan of the stream.
    fn is_better_by_room<R: Rooms>(&self, rooms: &R, bounds: &Bounds) -> bool {
        self.stream(bounds).nth(affordable_rows(rooms)).is_some()
    }

    /// This server's own events of a room from `from_stream_id` (inclusive) that are unexpired at `now_ms`, by
    /// ascending stream ID, at most `limit`. This server pushes them to a newcomer (P3, P4, P5).
    pub fn own_events(
        &self,
        room_id: &str,
        from_stream_id: i64,
        now_ms: i64,
        limit: usize,
    ) -> impl Iterator<Item = Found<'_>> {
        self.rooms
            .find(room_id)
            .into_iter()
            .flat_map(move |room| {
                self.own_by_room
                    .range(room_span(room, from_stream_id, i64::MAX))
            })
            .map(|key| self.rows.get(key[3]))
            .filter(move |row| row.is_unexpired(now_ms))
            .take(limit)
            .map(|row| self.found(row))
    }

    /// An event, even an expired one that the index has not dropped yet.
    #[must_use]
    pub fn get(&self, event_id: &str) -> Option<Found<'_>> {
        let number = self.number_of(event_id)?;
        Some(self.found(self.rows.get(number)))
    }

    /// Whether the index has the event, even an expired one that it has not dropped yet.
    #[must_use]
    pub fn contains(&self, event_id: &str) -> bool {
        self.number_of(event_id).is_some()
    }

    /// The rows of all rooms between the outermost bounds, in stream order.
    fn stream(&self, bounds: &Bounds) -> impl Iterator<Item = u32> + '_ {
        self.by_stream
            .range(number_key(bounds.first, 0)..=number_key(bounds.last, u32::MAX))
            .map(|key| key[2])
    }

    /// The rows of these rooms between the outermost bounds, merged into stream order.
    fn merged(&self, rooms: &[u32], bounds: &Bounds) -> impl Iterator<Item = u32> + '_ {
        let mut rest = Vec::new();
        let mut heads = Vec::new();
        for room in rooms {
            let mut keys = self
                .by_room
                .range(room_span(*room, bounds.first, bounds.last));
            if let Some([_, in_room @ ..]) = keys.next() {
                heads.push(Reverse((*in_room, rest.len())));
                rest.push(keys);
            }
        }
        // To build the heap at once is linear; to push the heads one by one is not.
        let mut heads = BinaryHeap::from(heads);
        std::iter::from_fn(move || {
            let mut head = heads.peek_mut()?;
            let Reverse(([_, _, number], room)) = *head;
            match rest[room].next() {
                Some([_, in_room @ ..]) => *head = Reverse((*in_room, room)),
                None => {
                    PeekMut::pop(head);
                }
            }
            Some(number)
        })
    }

    fn found<'a>(&'a self, row: &'a Row) -> Found<'a> {
        Found {
            stream_id: row.stream_id,
            room_id: self.rooms.get(row.room),
            event_id: row.event_id.as_str(),
            sender: self.senders.get(row.sender),
            expires_at_ms: row.expires_at_ms,
        }
    }
}
