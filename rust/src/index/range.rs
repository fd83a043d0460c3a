//! A range of a stream that several writers write to, as Synapse's `MultiWriterStreamToken` gives its ends.

use std::collections::HashMap;

use super::store::Interner;

/// A position in the stream: one number for all writers, and higher ones for those that are known to be further.
///
/// A writer's own position below `stream_id` counts as `stream_id`. Valid tokens have none, and Synapse's SQL does the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The position of every writer that is not in `writers`.
    pub stream_id: i64,
    /// The positions of those writers that are ahead of it, by instance name.
    pub writers: HashMap<String, i64>,
}

impl Position {
    fn of(&self, instance_name: &str) -> i64 {
        self.writers
            .get(instance_name)
            .map_or(self.stream_id, |own| self.stream_id.max(*own))
    }
}

/// The rows after one position and up to another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// Exclusive.
    pub after: Position,
    /// Inclusive.
    pub up_to: Position,
}

/// A [`Range`] with the writers' names looked up: what a scan needs for each row.
#[derive(Debug)]
pub(super) struct Bounds {
    /// Below this no row of any writer is in the range (inclusive).
    pub(super) first: i64,
    /// Above this no row of any writer is in the range (inclusive).
    pub(super) last: i64,
    everyone: (i64, i64),
    /// Few: the writers that either end names, and that have rows.
    writers: Vec<(u32, (i64, i64))>,
}

impl Bounds {
    /// `None` if the range is empty, whatever the rows are.
    pub(super) fn new(range: &Range, instances: &Interner) -> Option<Self> {
        let Range { after, up_to } = range;
        // No row comes after the greatest number of all.
        let first = after.stream_id.checked_add(1)?;
        let last = up_to
            .writers
            .values()
            .fold(up_to.stream_id, |a, b| a.max(*b));
        let writers = after
            .writers
            .keys()
            .chain(up_to.writers.keys())
            .filter_map(|name| Some((instances.find(name)?, (after.of(name), up_to.of(name)))))
            .collect();
        (first <= last).then_some(Self {
            first,
            last,
            everyone: (after.stream_id, up_to.stream_id),
            writers,
        })
    }

    /// Whether a row of this writer with this stream ID is in the range.
    pub(super) fn contain(&self, instance: u32, stream_id: i64) -> bool {
        let (after, up_to) = self
            .writers
            .iter()
            .find(|(writer, _)| *writer == instance)
            .map_or(self.everyone, |(_, bounds)| *bounds);
        after < stream_id && stream_id <= up_to
    }
}
