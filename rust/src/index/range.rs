//! A range of a stream that has several writers. Its ends are like Synapse's `MultiWriterStreamToken`.

use std::collections::HashMap;

use super::store::Interner;

/// A position in the stream: one number for all writers, and higher numbers for the writers that are further ahead.
///
/// A writer's own position below `stream_id` counts as `stream_id`. A valid token has no such position, and Synapse's
/// SQL treats it likewise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The position of every writer that is not in `writers`.
    pub stream_id: i64,
    /// The positions of the writers that are ahead of `stream_id`, by instance name.
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

/// A [`Range`] with the writers' names resolved to numbers. A scan compares each row with it.
#[derive(Debug)]
pub(super) struct Bounds {
    /// The lowest stream ID that a row in the range can have.
    pub(super) first: i64,
    /// The highest stream ID that a row in the range can have.
    pub(super) last: i64,
    everyone: (i64, i64),
    /// The writers that either end names and that have rows. They are few.
    writers: Vec<(u32, (i64, i64))>,
}

impl Bounds {
    /// `None` if no row can be in the range.
    pub(super) fn new(range: &Range, instances: &Interner) -> Option<Self> {
        let Range { after, up_to } = range;
        // No row comes after the greatest number.
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
