//! What somebody is given first who arrives late: all there is, or the present of it (D4).

use std::num::NonZeroI64;

use super::query::RoomEvents;
use super::{Range, Rooms, Row, StickyIndex};

/// How much a first response holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Most {
    /// So many events.
    pub events: usize,
    /// So many bytes, of the events' JSON; more only if the oldest event alone has more.
    pub bytes: usize,
    /// If that is not enough for all: so many keys of a sender in a room.
    pub keys: usize,
    /// And so many of the events are the oldest that are not given for their keys. The first of them is given in any
    /// case, as each response has to get on.
    pub oldest: usize,
}

/// What is given first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Present<'a> {
    /// The events, by room.
    pub found: RoomEvents<'a>,
    /// All events up to this stream ID are among them; `None` if all that there are.
    pub whole_up_to: Option<i64>,
}

impl StickyIndex {
    /// The events of these rooms in this range that are unexpired at `now_ms`; if these are too many, the newest of each
    /// key, and some of the oldest.
    ///
    /// A key is the state of its sender in its room. An event without one is a key of its own. The newest event of a key
    /// is the one whose claimed end is the latest, then whose ID is the greatest, as MSC4354 has clients order them. If
    /// there are too many keys as well, rooms take turns, then the servers of a room, then the senders of a server, each
    /// with its newest key first.
    ///
    /// The cost follows the number of rows in the rooms.
    ///
    /// # Errors
    /// A look into `rooms` failed.
    pub fn present_by_room<R: Rooms>(
        &self,
        rooms: &R,
        range: &Range,
        now_ms: i64,
        most: &Most,
    ) -> Result<Present<'_>, R::Error> {
        // All there is, as it mostly is.
        if let Some(found) = self.all_by_room(rooms, range, now_ms, most.events)? {
            if found.count <= most.events && found.bytes <= most.bytes {
                return Ok(Present {
                    found,
                    whole_up_to: None,
                });
            }
        }
        let rows = self.rows_in_rooms(rooms, range, now_ms, None)?;
        let bytes = rows.iter().map(|row| row.size()).sum::<usize>();
        if rows.len() <= most.events && bytes <= most.bytes {
            return Ok(Present {
                found: self.by_room_of(rows),
                whole_up_to: None,
            });
        }
        let (chosen, whole_up_to) = choose(&rows, most);
        let mut chosen = chosen.into_iter();
        let rows = rows.into_iter().filter(|_| chosen.next() == Some(true));
        Ok(Present {
            found: self.by_room_of(rows),
            whole_up_to,
        })
    }
}

/// What a response has room for yet.
struct Left {
    events: usize,
    bytes: usize,
}

impl Left {
    /// Takes the row if there is room for it.
    fn take(&mut self, row: &Row) -> bool {
        let fits = self.events > 0 && row.size() <= self.bytes;
        if fits {
            self.events -= 1;
            self.bytes -= row.size();
        }
        fits
    }
}

/// Which of the rows, which are in stream order; and up to which stream ID these are all.
fn choose(rows: &[&Row], most: &Most) -> (Vec<bool>, Option<i64>) {
    let mut chosen = vec![false; rows.len()];
    let mut oldest = most.oldest.min(most.events);
    let mut left = Left {
        events: most.events - oldest,
        bytes: most.bytes,
    };
    if let (Some(first), Some(is_chosen)) = (rows.first(), chosen.first_mut()) {
        *is_chosen = true;
        left.bytes = left.bytes.saturating_sub(first.size());
        oldest = oldest.saturating_sub(1);
    }
    for at in newest_of_each_key(rows, most.keys) {
        if left.events == 0 {
            break;
        }
        chosen[at] = chosen[at] || left.take(rows[at]);
    }
    left.events = oldest;
    let mut whole_up_to = None;
    for (row, is_chosen) in rows.iter().zip(&mut chosen) {
        if !*is_chosen && !left.take(row) {
            break;
        }
        *is_chosen = true;
        whole_up_to = Some(row.stream_id);
    }
    (chosen, whole_up_to)
}

/// A row by its place in the stream, with what its turn follows from, and how many of its group come before it.
#[derive(Clone, Copy)]
struct Turn {
    newness_ms: i64,
    /// 0 if the row has none.
    key: i64,
    at: u32,
    rank: u32,
    room: u32,
    server: u32,
    sender: u32,
}

impl Turn {
    fn new(at: usize, row: &Row) -> Self {
        Self {
            newness_ms: row.newness_ms(),
            key: row.key.map_or(0, NonZeroI64::get),
            at: u32::try_from(at).expect("there are fewer rows"),
            rank: 0,
            room: row.room,
            server: row.server,
            sender: row.sender,
        }
    }

    const fn of_sender(&self) -> u64 {
        pair(self.room, self.sender)
    }

    fn is_of_same_key(&self, other: &Self) -> bool {
        self.key != 0 && self.key == other.key && self.of_sender() == other.of_sender()
    }
}

/// Both as one number: to compare it is one step.
const fn pair(first: u32, second: u32) -> u64 {
    (first as u64) << 32 | second as u64
}

/// The places of the newest row of each key, at most `most` of a sender in a room, in the order of their turns.
///
/// Only numbers are sorted. To compare two event IDs takes a look at both rows; senders choose how often it is needed.
fn newest_of_each_key(rows: &[&Row], most: usize) -> Vec<usize> {
    let newest_first = |one: &Turn, other: &Turn| {
        let by_id = || {
            let id_of = |turn: &Turn| rows[turn.at as usize].event_id.as_str();
            id_of(other).cmp(id_of(one))
        };
        other.newness_ms.cmp(&one.newness_ms).then_with(by_id)
    };
    let turns = rows.iter().enumerate();
    let mut turns: Vec<_> = turns.map(|(at, row)| Turn::new(at, row)).collect();
    turns.sort_unstable_by_key(|turn| (turn.of_sender(), turn.key));
    turns.dedup_by(|next, kept| {
        let is_same = next.is_of_same_key(kept);
        if is_same && newest_first(next, kept).is_lt() {
            *kept = *next;
        }
        is_same
    });
    let mut first_ones = Vec::new();
    for of_sender in turns.chunk_by_mut(|one, other| one.of_sender() == other.of_sender()) {
        if most < of_sender.len() {
            of_sender.select_nth_unstable_by(most, newest_first);
        }
        let count = most.min(of_sender.len());
        let first = &mut of_sender[..count];
        first.sort_unstable_by(newest_first);
        number(first, Turn::of_sender);
        first_ones.extend_from_slice(first);
    }
    take_turns(&mut first_ones, |turn| pair(turn.room, turn.server));
    take_turns(&mut first_ones, |turn| turn.room.into());
    take_turns(&mut first_ones, |_| 0);
    first_ones.iter().map(|turn| turn.at as usize).collect()
}

/// Within each group, all with the same rank come before all with the next one; of these the newest first.
fn take_turns(turns: &mut [Turn], group: impl Fn(&Turn) -> u64) {
    turns.sort_unstable_by_key(|turn| {
        u128::from(group(turn)) << 64 | u128::from(pair(turn.rank, !turn.at))
    });
    number(turns, group);
}

/// Ranks what is sorted by group.
fn number(turns: &mut [Turn], group: impl Fn(&Turn) -> u64) {
    let mut before = None;
    for turn in turns {
        let of = group(turn);
        turn.rank = match before {
            Some((group, rank)) if group == of => rank + 1,
            _ => 0,
        };
        before = Some((of, turn.rank));
    }
}
