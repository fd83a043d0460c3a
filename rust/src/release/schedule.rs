//! Whose turn it is.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// A name that several collections share.
pub(super) type Name = Arc<str>;

enum Place<P> {
    Ready(P),
    Asleep(i64),
}

/// Names that are ready, in the order of their priority, or asleep until a time.
pub(super) struct Schedule<P> {
    places: HashMap<Name, Place<P>>,
    ready: BTreeSet<(P, Name)>,
    asleep: BTreeSet<(i64, Name)>,
}

impl<P: Ord> Default for Schedule<P> {
    fn default() -> Self {
        Self {
            places: HashMap::new(),
            ready: BTreeSet::new(),
            asleep: BTreeSet::new(),
        }
    }
}

impl<P: Copy + Ord> Schedule<P> {
    /// Makes the name ready, at this place in the order.
    pub(super) fn ready(&mut self, name: &Name, priority: P) {
        self.remove(name);
        self.places.insert(name.clone(), Place::Ready(priority));
        self.ready.insert((priority, name.clone()));
    }

    /// Takes the name out of the order until then.
    pub(super) fn sleep(&mut self, name: &Name, until_ms: i64) {
        self.remove(name);
        self.places.insert(name.clone(), Place::Asleep(until_ms));
        self.asleep.insert((until_ms, name.clone()));
    }

    pub(super) fn remove(&mut self, name: &Name) {
        match self.places.remove(name) {
            Some(Place::Ready(priority)) => self.ready.remove(&(priority, name.clone())),
            Some(Place::Asleep(until_ms)) => self.asleep.remove(&(until_ms, name.clone())),
            None => false,
        };
    }

    /// Takes out the names whose sleep is over, the one that is due longest first. The caller makes them ready.
    pub(super) fn wake(&mut self, now_ms: i64) -> Vec<Name> {
        let mut woken = Vec::new();
        while let Some((until_ms, _)) = self.asleep.first() {
            if *until_ms > now_ms {
                break;
            }
            if let Some((_, name)) = self.asleep.pop_first() {
                self.places.remove(&name);
                woken.push(name);
            }
        }
        woken
    }

    /// The next name in the order.
    pub(super) fn first(&self) -> Option<&Name> {
        self.first_place().map(|(_, name)| name)
    }

    /// The next name in the order, and its place there.
    pub(super) fn first_place(&self) -> Option<&(P, Name)> {
        self.ready.first()
    }

    /// How many names are ready.
    pub(super) fn count_ready(&self) -> usize {
        self.ready.len()
    }

    pub(super) fn is_ready(&self, name: &Name) -> bool {
        matches!(self.places.get(name), Some(Place::Ready(_)))
    }

    /// When the next name wakes.
    pub(super) fn next_wake_ms(&self) -> Option<i64> {
        self.asleep.first().map(|(until_ms, _)| *until_ms)
    }
}
