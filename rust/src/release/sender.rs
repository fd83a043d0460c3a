//! What waits of one sender in one room, the newest state first.
//!
//! An event's key says what it is the state of. Of the events of a key the newest is *current*, the others are
//! superseded. An event without a key is a key of its own. Keys take turns with their current events, then the
//! superseded ones follow. A sender's many keys cost other senders nothing: each release uses up the earliest deadline,
//! as if that event had been released. The event that gave up its deadline is *owed* a turn. If it might expire before
//! the turn of a later deadline comes, its sender goes by its expiry again.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

use super::schedule::Name;
use super::{Entry, Urgency};

/// The order that MSC4354's map has: by the end that the sender claims, in ms since the Unix epoch, then by ID.
type Newness = (i64, Name);

#[derive(Default)]
struct OfKey {
    waiting: BTreeSet<Newness>,
    /// The newest event that was released. Forgotten with the key, once none of it waits.
    released: Option<Newness>,
    /// The turn in which the key was released last; 0 if never.
    served: u64,
}

impl OfKey {
    /// The newest event, if it waits.
    fn current(&self) -> Option<&Newness> {
        let newest = self.waiting.last();
        newest.filter(|newest| {
            self.released
                .as_ref()
                .is_none_or(|released| released < *newest)
        })
    }
}

/// One sender's deferred events in one room.
#[derive(Default)]
pub(super) struct OfSender {
    /// The deadlines that the sender's turns among other senders go by; as many as events wait.
    deadlines: BTreeSet<Urgency>,
    by_expiry: BTreeSet<(Urgency, Name)>,
    keys: HashMap<i64, OfKey>,
    /// Current events: of the key that has waited longest for its turn first, then the newest.
    current: BTreeSet<(u64, Reverse<Newness>)>,
    superseded: BTreeSet<Newness>,
    /// The last turn went to the event that expires first.
    rescued: bool,
    /// The limit on a sender does not apply.
    pub(super) is_exempt: bool,
    /// How long that limit has each turn take. Known from the first turn on.
    pub(super) pace_ms: i64,
}

impl OfSender {
    pub(super) fn is_empty(&self) -> bool {
        self.by_expiry.is_empty()
    }

    /// The deadline that the sender's next turn goes by.
    pub(super) fn urgency(&self) -> Option<Urgency> {
        self.deadlines.first().copied()
    }

    /// When the event that expires first must have its turn, if a newer one was released on its deadline.
    pub(super) fn owed(&self) -> Option<Urgency> {
        let (expiring, _) = self.by_expiry.first()?;
        let is_owed = Some(*expiring) < self.urgency();
        is_owed.then(|| (self.turn_by_ms(*expiring), expiring.1))
    }

    /// The event's end, less the time that the limit on a sender has all of the sender's events take.
    fn turn_by_ms(&self, (expires_at_ms, _): Urgency) -> i64 {
        let count = i64::try_from(self.by_expiry.len()).unwrap_or(i64::MAX);
        expires_at_ms.saturating_sub(count.saturating_mul(self.pace_ms))
    }

    pub(super) fn add(&mut self, event_id: &Name, entry: &Entry) {
        self.deadlines.insert(entry.urgency);
        self.by_expiry.insert((entry.urgency, event_id.clone()));
        let newness = (entry.newness_ms, event_id.clone());
        match entry.key {
            None => {
                self.current.insert((0, Reverse(newness)));
            }
            Some(key) => self.change(key, |of_key, superseded| {
                superseded.insert(newness.clone());
                of_key.waiting.insert(newness);
            }),
        }
    }

    /// Changes what waits of a key. Meanwhile all of it counts as superseded.
    fn change(&mut self, key: i64, change: impl FnOnce(&mut OfKey, &mut BTreeSet<Newness>)) {
        let of_key = self.keys.entry(key).or_default();
        if let Some(current) = of_key.current() {
            self.current
                .remove(&(of_key.served, Reverse(current.clone())));
            self.superseded.insert(current.clone());
        }
        change(of_key, &mut self.superseded);
        if let Some(current) = of_key.current() {
            self.superseded.remove(current);
            self.current
                .insert((of_key.served, Reverse(current.clone())));
        }
        if of_key.waiting.is_empty() {
            self.keys.remove(&key);
        }
    }

    /// The next event, and whether it goes only because it is the one that expires first.
    ///
    /// Newest first must not have an event expire that its share would have allowed. So while one might expire before
    /// all that waits is through, it has every other turn, and all turns once only superseded ones are left.
    ///
    /// `safe_after_ms`: when all that waits of the server in the room is through, but for the limit on a sender.
    pub(super) fn next(&self, safe_after_ms: i64) -> Option<(Name, bool)> {
        let (urgency, expiring) = self.by_expiry.first()?;
        let is_at_risk = self.turn_by_ms(*urgency) <= safe_after_ms;
        if is_at_risk && (!self.rescued || self.current.is_empty()) {
            return Some((expiring.clone(), true));
        }
        let current = self.current.first().map(|(_, Reverse((_, id)))| id);
        let next = current.or_else(|| self.superseded.last().map(|(_, id)| id));
        next.map(|event_id| (event_id.clone(), false))
    }

    /// Notes that the next event was charged, and how it was chosen.
    pub(super) fn chosen(&mut self, is_rescue: bool) {
        self.rescued = is_rescue;
    }

    /// Takes the event out. `released_in`: the turn in which it was released; `None` if it is just gone.
    pub(super) fn remove(&mut self, event_id: &Name, entry: &Entry, released_in: Option<u64>) {
        self.by_expiry.remove(&(entry.urgency, event_id.clone()));
        if released_in.is_some() {
            self.deadlines.pop_first();
        } else if let Some(own) = self.deadlines.range(entry.urgency..).next().copied() {
            // If a newer event was released in its stead, the next later deadline is the one that was left to it.
            self.deadlines.remove(&own);
        }
        let newness = (entry.newness_ms, event_id.clone());
        match entry.key {
            None => {
                self.current.remove(&(0, Reverse(newness)));
            }
            Some(key) => self.change(key, |of_key, superseded| {
                superseded.remove(&newness);
                of_key.waiting.remove(&newness);
                if let Some(turn) = released_in {
                    of_key.served = turn;
                    of_key.released = of_key.released.take().max(Some(newness));
                }
            }),
        }
    }
}
