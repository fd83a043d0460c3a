//! How many servers have unexpired events in a room.

use super::{room_span, Row, StickyIndex};
use crate::rules;

/// What the index knows of one server's rows in one room.
#[derive(Debug)]
pub(super) struct Tally {
    rows: u32,
    /// When the last of the rows expires, or later if `stale`.
    latest_ms: i64,
    /// The row that `latest_ms` came from is gone. The next query computes `latest_ms` again. A removal does not: else
    /// the redaction of many events, one by one, would scan the room once for each.
    stale: bool,
}

impl StickyIndex {
    /// How many different servers sent the events of a room that are unexpired at `now_ms`.
    ///
    /// A sender without a domain belongs to no server. The cost follows the number of servers. If a server's last event
    /// to expire was removed early, the query scans the room's rows, once; hence `&mut`.
    pub fn server_count(&mut self, room_id: &str, now_ms: i64) -> usize {
        let Some(room) = self.rooms.find(room_id) else {
            return 0;
        };
        let all_servers = (room, 0)..=(room, u32::MAX);
        // If even a stale time is past, the true one is too.
        if self
            .tallies
            .range(all_servers.clone())
            .any(|(_, tally)| tally.stale && rules::is_unexpired(tally.latest_ms, now_ms))
        {
            self.freshen_tallies(room);
        }
        self.tallies
            .range(all_servers)
            .filter(|(_, tally)| rules::is_unexpired(tally.latest_ms, now_ms))
            .filter(|((_, server), _)| !self.servers.get(*server).is_empty())
            .count()
    }

    pub(super) fn count_row(&mut self, row: &Row) {
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
    }

    pub(super) fn discount_row(&mut self, row: &Row) {
        let key = (row.room, row.server);
        if let Some(tally) = self.tallies.get_mut(&key) {
            tally.rows -= 1;
            tally.stale |= tally.latest_ms == row.expires_at_ms;
            if tally.rows == 0 {
                self.tallies.remove(&key);
            }
        }
    }

    fn freshen_tallies(&mut self, room: u32) {
        for (_, tally) in self.tallies.range_mut((room, 0)..=(room, u32::MAX)) {
            tally.latest_ms = i64::MIN;
            tally.stale = false;
        }
        for [_, _, _, number] in self.by_room.range(room_span(room, i64::MIN, i64::MAX)) {
            let row = self.rows.get(*number);
            if let Some(tally) = self.tallies.get_mut(&(room, row.server)) {
                tally.latest_ms = tally.latest_ms.max(row.expires_at_ms);
            }
        }
    }
}
