//! Limits on how fast sticky events may come (L1, L6): GCRA buckets by scope and key, several in one decision.
//!
//! A bucket of `burst_count` refills at `per_second`. All that is kept of it is the time at which it will be full, and nothing at
//! all once it is: a full bucket and one that never was are the same. Memory is bounded however many keys are made up. When there
//! is no room for a bucket of its own, a key shares one of a fixed number, picked by a secret hash. What fills the table thus
//! takes nothing away from the buckets in it, empties none of them into a fresh one, and cannot be aimed at another key.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use crate::error::Error;
use crate::steady::SteadyTime;

const NS_PER_MS: i64 = 1_000_000;
/// How many buckets the keys without one of their own share, for each scope.
const SHARED_BUCKETS: usize = 1024;
const SWEEP_EVERY_NS: i64 = 1_000 * NS_PER_MS;

/// What a limit is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// One server, in all rooms together.
    Server,
    /// One server in one room.
    ServerInRoom,
    /// One user in one room.
    Sender,
    /// All other servers together in one room.
    Room,
    /// One user of this server, in all rooms together.
    User,
}

impl Scope {
    /// Every scope there is.
    pub const ALL: [Self; 5] = [
        Self::Server,
        Self::ServerInRoom,
        Self::Sender,
        Self::Room,
        Self::User,
    ];

    /// The name of the option that limits this.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Server => "per_server",
            Self::ServerInRoom => "per_server_in_room",
            Self::Sender => "per_sender",
            Self::Room => "per_room",
            Self::User => "per_user",
        }
    }
}

/// Whose bucket: a scope and the names that go with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key<'a> {
    /// A server's name.
    Server(&'a str),
    /// A server's name and a room ID.
    ServerInRoom(&'a str, &'a str),
    /// A user ID and a room ID.
    Sender(&'a str, &'a str),
    /// A room ID.
    Room(&'a str),
    /// A user ID.
    User(&'a str),
}

impl<'a> Key<'a> {
    /// Which limit applies.
    #[must_use]
    pub const fn scope(&self) -> Scope {
        match self {
            Self::Server(_) => Scope::Server,
            Self::ServerInRoom(..) => Scope::ServerInRoom,
            Self::Sender(..) => Scope::Sender,
            Self::Room(_) => Scope::Room,
            Self::User(_) => Scope::User,
        }
    }

    /// The four buckets that an event of another server takes from.
    #[must_use]
    pub const fn of_event(server: &'a str, room_id: &'a str, sender: &'a str) -> [Self; 4] {
        [
            Self::Server(server),
            Self::ServerInRoom(server, room_id),
            Self::Sender(sender, room_id),
            Self::Room(room_id),
        ]
    }

    /// One string for each key, and no two keys with the same: no name of Matrix holds a NUL that would get this far unescaped,
    /// and the length of the first name says where it ends all the same.
    fn stored(&self) -> String {
        let (first, second) = match *self {
            Self::Server(first) | Self::Room(first) | Self::User(first) => (first, ""),
            Self::ServerInRoom(first, second) | Self::Sender(first, second) => (first, second),
        };
        format!("{}\0{}\0{first}{second}", self.scope() as u8, first.len())
    }
}

/// How fast a bucket refills, and how much fits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    interval_ns: i64,
    burst_count: i64,
}

impl Limit {
    /// # Errors
    ///
    /// `per_second` is not from 0.001 to 1,000,000, or `burst_count` not from 1 to 1,000,000.
    pub fn new(per_second: f64, burst_count: u32) -> Result<Self, Error> {
        if !(0.001..=1e6).contains(&per_second) {
            return Err(Error::BadValue {
                argument: "per_second".to_owned(),
                expected: "from 0.001 to 1000000",
            });
        }
        if !(1..=1_000_000).contains(&burst_count) {
            return Err(Error::BadValue {
                argument: "burst_count".to_owned(),
                expected: "from 1 to 1000000",
            });
        }
        // Rounded up: never faster than the limit says.
        #[allow(clippy::cast_possible_truncation)] // 1,000 to 10^12
        let interval_ns = (1e9 / per_second).ceil() as i64;
        Ok(Self {
            interval_ns,
            burst_count: i64::from(burst_count),
        })
    }

    /// How long after `now_ns` a bucket that is full at `full_at_ns` lets `cost` pass; 0 or less if it does so now.
    ///
    /// What costs more than fits in needs a full bucket, and leaves it that much further from full.
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

/// Which limit is in the way, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The limit that it takes longest for.
    pub scope: Scope,
    /// When the same would pass, in ms from now, if nothing else takes from its buckets meanwhile; at least 1.
    pub retry_after_ms: i64,
}

/// The limits, and how much of each is used up at the moment.
pub struct Limiter<S = RandomState> {
    limits: [Option<Limit>; Scope::ALL.len()],
    /// By stored key: when the bucket will be full, in ns of this limiter's own time.
    full_at_ns: HashMap<String, i64, S>,
    shared_full_at_ns: Vec<i64>,
    capacity: usize,
    sweep_at: usize,
    swept_ns: i64,
    /// A clock that is set back neither fills a bucket nor holds it up until the clock is where it was.
    time: SteadyTime,
}

impl Limiter<RandomState> {
    /// A limiter with all buckets full. At most `capacity` keys have a bucket of their own.
    #[must_use]
    pub fn new(limits: impl IntoIterator<Item = (Scope, Limit)>, capacity: usize) -> Self {
        Self::with_hasher(limits, capacity, RandomState::new())
    }
}

impl<S: BuildHasher> Limiter<S> {
    /// The same, with a hash of choice (for tests: it must be secret otherwise).
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

    /// Takes `cost` from each of the keys' buckets, or nothing from any.
    ///
    /// A key that is given twice pays for both; one without a limit pays nothing. A cost larger than its bucket passes once the
    /// bucket is full.
    ///
    /// # Errors
    ///
    /// A limit is in the way. Nothing has been taken, so asking again costs nothing.
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
            // Looked up anew: two keys may share a bucket.
            let full_at_ns = self.full_at_ns(scope, &stored).max(now_ns);
            self.store(scope, stored, full_at_ns.saturating_add(price_ns), now_ns);
        }
        Ok(())
    }

    /// Would the key's bucket let so many pass one by one, now? Takes nothing.
    pub fn has(&mut self, key: Key<'_>, count: u32, now_ms: i64) -> bool {
        let Some(limit) = self.limits[key.scope() as usize] else {
            return true;
        };
        let now_ns = self.time.at(now_ms).saturating_mul(NS_PER_MS);
        i64::from(count) <= limit.burst_count
            && limit.wait_ns(self.full_at_ns(key.scope(), &key.stored()), now_ns, count) <= 0
    }

    /// Tells what time it is. A clock's being set back is noticed at the next call; what passed in between does not count.
    pub fn tick(&mut self, now_ms: i64) {
        self.time.at(now_ms);
    }

    /// How many keys have a bucket of their own at the moment.
    #[must_use]
    pub fn len(&self) -> usize {
        self.full_at_ns.len()
    }

    /// Whether no key has a bucket of its own.
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
        #[allow(clippy::cast_possible_truncation)] // any of its bits will do
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

    /// Forgets the full buckets. Now and then only: it looks at all of them.
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
