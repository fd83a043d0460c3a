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
        let bytes = || rows.iter().map(|row| row.size()).sum::<usize>();
        if rows.len() <= most.events && bytes() <= most.bytes {
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

/// What may be the newest row of its key, by its place in the stream.
#[derive(Clone, Copy)]
struct Candidate {
    newness_ms: i64,
    /// `None` if the row has none.
    key: Option<NonZeroI64>,
    at: u32,
}

/// A row that waits for its turn. Rooms have numbers from 0, and so have their servers.
#[derive(Clone, Copy)]
struct Waiting {
    at: u32,
    /// How many of its group come before it.
    rank: u32,
    room: u32,
    server: u32,
}

/// The places of the newest row of each key, at most `most` of a sender in a room, in the order of their turns.
///
/// All rows are sorted once, and as plain numbers: a comparison without a branch is the same work whatever is compared.
/// What follows is linear, but for a sender's own rows. To compare two event IDs takes a look at both rows; senders
/// choose how often it is needed.
fn newest_of_each_key(rows: &[&Row], most: usize) -> impl Iterator<Item = usize> {
    let mut by_sender: Vec<u128> = (0..)
        .zip(rows)
        .map(|(at, row)| in_sender(row, at))
        .collect();
    by_sender.sort_unstable();
    let mut newest_last = vec![None; rows.len()];
    let (mut rooms, mut servers) = (0, 0);
    for of_room in by_sender.chunk_by(|one, other| one >> 96 == other >> 96) {
        for of_server in of_room.chunk_by(|one, other| one >> 64 == other >> 64) {
            for of_sender in of_server.chunk_by(|one, other| one >> 32 == other >> 32) {
                let mut wait = |at: u32, rank| {
                    newest_last[at as usize] = Some(Waiting {
                        at,
                        rank,
                        room: rooms,
                        server: servers,
                    });
                };
                if let [of_sender] = of_sender {
                    if most > 0 {
                        wait(*of_sender as u32, 0);
                    }
                } else {
                    let places = of_sender.iter().map(|of_sender| *of_sender as u32);
                    let first = first_of_sender(rows, places, most);
                    (0..).zip(first).for_each(|(rank, row)| wait(row.at, rank));
                }
            }
            servers += 1;
        }
        rooms += 1;
    }
    let mut turns: Vec<Waiting> = newest_last.into_iter().rev().flatten().collect();
    take_turns(&mut turns, servers, |row| row.server);
    take_turns(&mut turns, rooms, |row| row.room);
    let order = in_order(turns.iter().map(|row| row.rank));
    order
        .into_iter()
        .map(move |of| turns[of as usize].at as usize)
}

/// The row's room, server, sender and place in the stream as one number, the most significant first.
fn in_sender(row: &Row, at: u32) -> u128 {
    [row.room, row.server, row.sender, at]
        .into_iter()
        .fold(0, |number, part| number << 32 | u128::from(part))
}

/// Of a sender's rows in a room the newest of each key, at most `most`, the newest first.
fn first_of_sender(
    rows: &[&Row],
    places: impl Iterator<Item = u32>,
    most: usize,
) -> Vec<Candidate> {
    let newest_first = |one: &Candidate, other: &Candidate| {
        let by_id = || {
            let id_of = |row: &Candidate| rows[row.at as usize].event_id.as_str();
            id_of(other).cmp(id_of(one))
        };
        other.newness_ms.cmp(&one.newness_ms).then_with(by_id)
    };
    let mut candidates: Vec<_> = places
        .map(|at| {
            let row = rows[at as usize];
            Candidate {
                newness_ms: row.newness_ms(),
                key: row.key,
                at,
            }
        })
        .collect();
    candidates.sort_unstable_by_key(|row| row.key);
    candidates.dedup_by(|next, kept| {
        let is_same = next.key.is_some() && next.key == kept.key;
        if is_same && newest_first(next, kept).is_lt() {
            *kept = *next;
        }
        is_same
    });
    if most < candidates.len() {
        candidates.select_nth_unstable_by(most, newest_first);
        candidates.truncate(most);
    }
    candidates.sort_unstable_by(newest_first);
    candidates
}

/// Ranks the rows, which are newest first, within each of so many groups: all with the same rank come before all with
/// the next one; of these the newest first.
fn take_turns(turns: &mut [Waiting], groups: u32, group: impl Fn(&Waiting) -> u32) {
    let mut ranked = vec![0; groups as usize];
    for of in in_order(turns.iter().map(|row| row.rank)) {
        let row = &mut turns[of as usize];
        let before = &mut ranked[group(row) as usize];
        row.rank = *before;
        *before += 1;
    }
}

/// The places of these numbers, the least first; of equal ones the first place first. It counts them instead of
/// comparing them. So its cost follows how many there are, and the greatest.
fn in_order(numbers: impl ExactSizeIterator<Item = u32> + Clone) -> Vec<u32> {
    let mut order = vec![0; numbers.len()];
    let mut starts = Vec::new();
    for number in numbers.clone() {
        let number = number as usize;
        if starts.len() <= number {
            starts.resize(number + 1, 0);
        }
        starts[number] += 1;
    }
    let mut start = 0;
    for of_number in &mut starts {
        start += std::mem::replace(of_number, start);
    }
    for (place, number) in (0..).zip(numbers) {
        let start = &mut starts[number as usize];
        order[*start] = place;
        *start += 1;
    }
    order
}
