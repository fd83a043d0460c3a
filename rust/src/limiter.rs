//! Limits on the rate of sticky events (L1, L6): GCRA buckets by scope and key. One decision may take from several.
//!
//! A bucket holds `burst_count` and refills at `per_second`. The limiter stores only the time at which a bucket will be
//! full. It stores nothing for a full bucket, so a full bucket and an unknown one are the same. Memory is bounded,
//! however many keys a sender makes up. When the table has no room for a key, the key shares a bucket with others.
//! There is a fixed number of shared buckets, and a secret hash picks one. So a sender who fills the table takes
//! nothing from the buckets in it, resets none of them, and cannot aim at another key.

mod key;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use crate::error::Error;
use crate::steady::SteadyTime;
pub use key::{Key, Scope};

const NS_PER_MS: i64 = 1_000_000;
/// How many shared buckets each scope has.
const SHARED_BUCKETS: usize = 1024;
const SWEEP_EVERY_NS: i64 = 1_000 * NS_PER_MS;

/// How fast a bucket refills, and how much it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    interval_ns: i64,
    burst_count: i64,
}

impl Limit {
    /// Creates a limit.
    ///
    /// # Errors
    /// `per_second` is not from 0.001 to 1,000,000, or `burst_count` is not from 1 to 1,000,000.
    pub fn new(per_second: f64, burst_count: u32) -> Result<Self, Error> {
        if !(0.001..=1e6).contains(&per_second) {
            return Err(Error::bad_value("per_second", "from 0.001 to 1000000"));
        }
        if !(1..=1_000_000).contains(&burst_count) {
            return Err(Error::bad_value("burst_count", "from 1 to 1000000"));
        }
        // Rounded up: a bucket never refills faster than the limit says.
        #[allow(clippy::cast_possible_truncation)] // It is 1,000 to 10^12.
        let interval_ns = (1e9 / per_second).ceil() as i64;
        Ok(Self {
            interval_ns,
            burst_count: i64::from(burst_count),
        })
    }

    /// How long after `now_ns` a bucket that is full at `full_at_ns` admits `cost`; 0 or less if it admits it now.
    ///
    /// A cost over the bucket's size needs a full bucket. It leaves the bucket that much further from full.
    const fn wait_ns(&self, full_at_ns: i64, now_ns: i64, cost: u32) -> i64 {
        let missing_ns = full_at_ns.saturating_sub(now_ns);
        let over = cost as i64 - self.burst_count;
        if over >= 0 {
            return missing_ns;
        }
        let missing_ns = if missing_ns > 0 { missing_ns } else { 0 };
        missing_ns.saturating_add(over.saturating_mul(self.interval_ns))
    }
}

/// Which limit refused, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The limit that takes longest to admit the same.
    pub scope: Scope,
    /// In how many ms the limiter would admit the same, if no other charge comes first; at least 1.
    pub retry_after_ms: i64,
}

/// The limits, and how much of each is used up.
pub struct Limiter<S = RandomState> {
    limits: [Option<Limit>; Scope::ALL.len()],
    /// When each bucket will be full, in ns of this limiter's steady time. By [`Key::stored`].
    full_at_ns: HashMap<String, i64, S>,
    shared_full_at_ns: Vec<i64>,
    capacity: usize,
    sweep_at: usize,
    swept_ns: i64,
    /// A clock that is set back neither fills a bucket nor stops its refill.
    time: SteadyTime,
}

impl Limiter<RandomState> {
    /// Creates a limiter whose buckets are all full. At most `capacity` keys have their own bucket.
    #[must_use]
    pub fn new(limits: impl IntoIterator<Item = (Scope, Limit)>, capacity: usize) -> Self {
        Self::with_hasher(limits, capacity, RandomState::new())
    }
}

impl<S: BuildHasher> Limiter<S> {
    /// Creates a limiter with a given hasher, for tests. Outside of tests the hash must be secret.
    #[must_use]
    pub fn with_hasher(
        limits: impl IntoIterator<Item = (Scope, Limit)>,
        capacity: usize,
        hasher: S,
    ) -> Self {
        let mut by_scope = [None; Scope::ALL.len()];
        for (scope, limit) in limits {
            by_scope[scope as usize] = Some(limit);
        }
        Self {
            limits: by_scope,
            full_at_ns: HashMap::with_hasher(hasher),
            shared_full_at_ns: vec![i64::MIN; Scope::ALL.len() * SHARED_BUCKETS],
            capacity,
            sweep_at: capacity.min(1024),
            swept_ns: i64::MIN,
            time: SteadyTime::new(),
        }
    }

    /// Charges each key's bucket its cost, or charges nothing.
    ///
    /// A key that occurs twice is charged for both. A key without a limit is charged nothing. A cost over the bucket's
    /// size is admitted once the bucket is full.
    ///
    /// # Errors
    /// A limit refused. Nothing was charged.
    pub fn admit(&mut self, charges: &[(Key<'_>, u32)], now_ms: i64) -> Result<(), Refusal> {
        let now_ns = self.time.at(now_ms).saturating_mul(NS_PER_MS);
        let mut charges: Vec<(Key<'_>, u32)> = charges.to_vec();
        charges.sort_unstable();
        charges.dedup_by(|later, kept| {
            let same = later.0 == kept.0;
            if same {
                kept.1 = kept.1.saturating_add(later.1);
            }
            same
        });

        let mut bills = Vec::with_capacity(charges.len());
        let mut refusal: Option<(i64, Scope)> = None;
        for (key, cost) in charges {
            let Some(limit) = self.limits[key.scope() as usize] else {
                continue;
            };
            let stored = key.stored();
            let full_at_ns = self.full_at_ns(key.scope(), &stored);
            let wait_ns = limit.wait_ns(full_at_ns, now_ns, cost);
            if wait_ns > 0 && refusal.is_none_or(|(longest_ns, _)| longest_ns < wait_ns) {
                refusal = Some((wait_ns, key.scope()));
            }
            let price_ns = i64::from(cost).saturating_mul(limit.interval_ns);
            bills.push((key.scope(), stored, price_ns));
        }
        if let Some((wait_ns, scope)) = refusal {
            return Err(Refusal {
                scope,
                retry_after_ms: wait_ns.saturating_add(NS_PER_MS - 1) / NS_PER_MS,
            });
        }
        for (scope, stored, price_ns) in bills {
            // A new lookup, since two keys may share a bucket.
            let full_at_ns = self.full_at_ns(scope, &stored).max(now_ns);
            self.store(scope, stored, full_at_ns.saturating_add(price_ns), now_ns);
        }
        Ok(())
    }

    /// Whether the key's bucket would admit `count` events one by one now. Charges nothing.
    pub fn has(&mut self, key: Key<'_>, count: u32, now_ms: i64) -> bool {
        let Some(limit) = self.limits[key.scope() as usize] else {
            return true;
        };
        let now_ns = self.time.at(now_ms).saturating_mul(NS_PER_MS);
        i64::from(count) <= limit.burst_count
            && limit.wait_ns(self.full_at_ns(key.scope(), &key.stored()), now_ns, count) <= 0
    }

    /// Tells the limiter the time, without a decision. It compares the time with that of the previous call to see
    /// whether the clock was set back.
    pub fn tick(&mut self, now_ms: i64) {
        self.time.at(now_ms);
    }

    /// In how many ms a bucket of this scope refills by one event, rounded up; 0 without such a limit.
    #[must_use]
    pub fn interval_ms(&self, scope: Scope) -> i64 {
        let limit = self.limits[scope as usize];
        limit.map_or(0, |limit| (limit.interval_ns + NS_PER_MS - 1) / NS_PER_MS)
    }

    /// How many keys have their own bucket now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.full_at_ns.len()
    }

    /// Whether no key has its own bucket.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.full_at_ns.is_empty()
    }

    fn full_at_ns(&self, scope: Scope, stored: &str) -> i64 {
        match self.full_at_ns.get(stored) {
            Some(full_at_ns) => *full_at_ns,
            None => self.shared_full_at_ns[self.shared(scope, stored)],
        }
    }

    fn shared(&self, scope: Scope, stored: &str) -> usize {
        #[allow(clippy::cast_possible_truncation)] // Any of its bits will do.
        let hash = self.full_at_ns.hasher().hash_one(stored) as usize;
        scope as usize * SHARED_BUCKETS + hash % SHARED_BUCKETS
    }

    fn store(&mut self, scope: Scope, stored: String, full_at_ns: i64, now_ns: i64) {
        if let Some(kept) = self.full_at_ns.get_mut(&stored) {
            *kept = full_at_ns;
            return;
        }
        if self.full_at_ns.len() >= self.sweep_at {
            self.sweep(now_ns);
        }
        if self.full_at_ns.len() < self.capacity {
            self.full_at_ns.insert(stored, full_at_ns);
        } else {
            let shared = self.shared(scope, &stored);
            self.shared_full_at_ns[shared] = full_at_ns;
        }
    }

    /// Removes the full buckets from the table. This scans the whole table. So a table at its capacity is swept at most
    /// once a second.
    fn sweep(&mut self, now_ns: i64) {
        if self.full_at_ns.len() >= self.capacity
            && now_ns < self.swept_ns.saturating_add(SWEEP_EVERY_NS)
        {
            return;
        }
        self.swept_ns = now_ns;
        self.full_at_ns.retain(|_, full_at_ns| *full_at_ns > now_ns);
        self.sweep_at = (self.full_at_ns.len() * 2).max(1024).min(self.capacity);
    }
}
