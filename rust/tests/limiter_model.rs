//! The limiter against plain arithmetic, against the crate `governor`, and against attempts to trick it.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasherDefault;
use std::num::NonZeroU32;
use std::time::Duration;

use _core::limiter::{Key, Limit, Limiter, Refusal, Scope};
use governor::clock::FakeRelativeClock;
use governor::{Quota, RateLimiter};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

const REGRESSIONS: &str = "rust/tests/proptest-regressions/limiter_model.txt";
const NAMES: [&str; 3] = ["a", "b", "c"];
const START_MS: i64 = 1_800_000_000_000;
const HOUR_MS: i64 = 3_600_000;

fn limit(per_second: f64, burst_count: u32) -> Limit {
    Limit::new(per_second, burst_count).expect("a valid limit")
}

fn key(scope: usize, first: usize, second: usize) -> Key<'static> {
    let (first, second) = (NAMES[first], NAMES[second]);
    match scope {
        0 => Key::Server(first),
        1 => Key::ServerInRoom(first, second),
        2 => Key::Sender(first, second),
        3 => Key::Room(first),
        _ => Key::User(first),
    }
}

/// A simple model: each bucket counts its use in nanoseconds. It has no bound and no shared buckets.
struct Model {
    limits: HashMap<Scope, (i128, i128)>,
    used_ns: BTreeMap<Key<'static>, i128>,
    now_ms: i64,
}

impl Model {
    fn advance(&mut self, now_ms: i64) {
        let passed_ns = i128::from((now_ms - self.now_ms).max(0)) * 1_000_000;
        for used_ns in self.used_ns.values_mut() {
            *used_ns = (*used_ns - passed_ns).max(0);
        }
        self.now_ms = now_ms;
    }

    fn admit(&mut self, charges: &[(Key<'static>, u32)]) -> Result<(), Refusal> {
        let mut costs: BTreeMap<Key<'static>, i128> = BTreeMap::new();
        for (key, cost) in charges {
            *costs.entry(*key).or_default() += i128::from(*cost);
        }
        let mut longest: Option<i128> = None;
        for (key, cost) in &costs {
            let Some((interval_ns, burst)) = self.limits.get(&key.scope()) else {
                continue;
            };
            let used_ns = self.used_ns.get(key).copied().unwrap_or(0);
            let wait_ns = if cost > burst {
                used_ns
            } else {
                used_ns + cost * interval_ns - burst * interval_ns
            };
            if wait_ns > 0 {
                longest = Some(longest.unwrap_or(0).max(wait_ns));
            }
        }
        if let Some(wait_ns) = longest {
            return Err(Refusal {
                scope: Scope::Server, // Not compared: several limits may take equally long.
                retry_after_ms: i64::try_from((wait_ns + 999_999) / 1_000_000).expect("small"),
            });
        }
        for (key, cost) in costs {
            if let Some((interval_ns, _)) = self.limits.get(&key.scope()) {
                *self.used_ns.entry(key).or_default() += cost * interval_ns;
            }
        }
        Ok(())
    }
}

type Step = (Vec<((usize, usize, usize), u32)>, i64);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let charge = ((0..5usize, 0..3usize, 0..3usize), 0..8u32);
    vec((vec(charge, 0..6), 0..400i64), 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(REGRESSIONS))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn same_as_the_model(
        steps in steps(),
        limits in vec(proptest::option::of((1..50u32, 1..12u32)), 5),
    ) {
        let limits: Vec<(Scope, Limit, (i128, i128))> = Scope::ALL
            .into_iter()
            .zip(limits)
            .filter_map(|(scope, limit)| limit.map(|(rate, burst)| (scope, rate, burst)))
            .map(|(scope, rate, burst)| {
                let interval_ns = (1e9 / f64::from(rate)).ceil() as i128;
                (scope, limit(f64::from(rate), burst), (interval_ns, i128::from(burst)))
            })
            .collect();
        let mut limiter = Limiter::new(limits.iter().map(|(s, l, _)| (*s, *l)), 10_000);
        let mut model = Model {
            limits: limits.iter().map(|(s, _, m)| (*s, *m)).collect(),
            used_ns: BTreeMap::new(),
            now_ms: START_MS,
        };
        let mut now_ms = START_MS;
        for (charges, step_ms) in steps {
            now_ms += step_ms;
            model.advance(now_ms);
            let charges: Vec<(Key<'static>, u32)> =
                charges.into_iter().map(|((s, a, b), cost)| (key(s, a, b), cost)).collect();
            let expected = model.admit(&charges).map_err(|refusal| refusal.retry_after_ms);
            let found = limiter.admit(&charges, now_ms).map_err(|refusal| refusal.retry_after_ms);
            prop_assert_eq!(found, expected);
        }
    }

    /// L1: no window admits more than the burst plus the refill over the window's length.
    #[test]
    fn never_more_than_the_limit(
        steps in vec((1..20u32, 0..300i64), 1..150),
        rate in 1..40u32,
        burst in 1..15u32,
    ) {
        let mut limiter = Limiter::new([(Scope::Server, limit(f64::from(rate), burst))], 100);
        let mut now_ms = START_MS;
        let mut admitted: Vec<(i64, u32)> = Vec::new();
        for (cost, step_ms) in steps {
            now_ms += step_ms;
            if limiter.admit(&[(Key::Server("a"), cost)], now_ms).is_ok() {
                admitted.push((now_ms, cost));
            }
        }
        for from in 0..admitted.len() {
            let mut sum = 0;
            // A cost over the burst needs a full bucket. It counts as the burst of its window.
            let mut largest = burst;
            for (at_ms, cost) in &admitted[from..] {
                sum += cost;
                largest = largest.max(*cost);
                let window_s = (at_ms - admitted[from].0) as f64 / 1000.0;
                prop_assert!(f64::from(sum) <= f64::from(largest) + f64::from(rate) * window_s + 1e-6);
            }
        }
    }

    /// A retry at the time that the refusal gave is admitted, even one that costs more than the bucket's size. A
    /// refusal charges nothing.
    #[test]
    fn everybody_gets_through(
        costs in vec(1..60u32, 1..20),
        rate in 1..40u32,
        burst in 1..15u32,
        impatience in 0..4usize,
    ) {
        let mut limiter = Limiter::new([(Scope::Server, limit(f64::from(rate), burst))], 100);
        let mut now_ms = START_MS;
        for cost in costs {
            let charge = [(Key::Server("a"), cost)];
            if let Err(refusal) = limiter.admit(&charge, now_ms) {
                prop_assert!(refusal.retry_after_ms >= 1);
                for _ in 0..impatience {
                    prop_assert_eq!(limiter.admit(&charge, now_ms), Err(refusal));
                }
                // It is refused a millisecond before, and admitted on time.
                let early_ms = now_ms + refusal.retry_after_ms - 1;
                if early_ms > now_ms {
                    prop_assert!(limiter.admit(&charge, early_ms).is_err());
                }
                now_ms += refusal.retry_after_ms;
                prop_assert_eq!(limiter.admit(&charge, now_ms), Ok(()));
            }
        }
    }

    #[test]
    fn same_as_governor(
        steps in vec((1..9u32, 0..50i64), 1..200),
        interval_ms in 1..40u32,
        burst in 1..9u32,
    ) {
        let quota = Quota::with_period(Duration::from_millis(interval_ms.into()))
            .expect("not zero")
            .allow_burst(NonZeroU32::new(burst).expect("not zero"));
        let clock = FakeRelativeClock::default();
        let oracle = RateLimiter::direct_with_clock(quota, clock.clone());
        let limits = [(Scope::User, limit(1000.0 / f64::from(interval_ms), burst))];
        // 1000 / 3 is not a whole number. This test leaves out rates that round differently.
        prop_assume!((1e9 / (1000.0 / f64::from(interval_ms))).ceil() as u64 == u64::from(interval_ms) * 1_000_000);
        let mut limiter = Limiter::new(limits, 100);
        let mut now_ms = START_MS;
        for (cost, step_ms) in steps {
            now_ms += step_ms;
            clock.advance(Duration::from_millis(step_ms as u64));
            let found = limiter.admit(&[(Key::User("a"), cost)], now_ms).is_ok();
            if cost <= burst {
                let cost = NonZeroU32::new(cost).expect("not zero");
                prop_assert_eq!(found, matches!(oracle.check_n(cost), Ok(Ok(()))));
            } else if found {
                // Governor never admits a cost over the burst.
                break;
            }
        }
    }

    /// A clock that is set back neither fills a bucket nor stops its refill. A clock that is set forward fills it once.
    #[test]
    fn clock_jumps(jumps in vec(-2 * HOUR_MS..2 * HOUR_MS, 1..20)) {
        let mut limiter = Limiter::new([(Scope::Server, limit(1.0, 5))], 100);
        let charge = [(Key::Server("a"), 1)];
        let mut now_ms = START_MS;
        for jump_ms in jumps {
            while limiter.admit(&charge, now_ms).is_ok() {}
            let before = limiter.admit(&charge, now_ms).expect_err("used up");
            now_ms += jump_ms;
            if jump_ms <= 0 {
                prop_assert_eq!(limiter.admit(&charge, now_ms), Err(before));
                prop_assert_eq!(limiter.admit(&charge, now_ms + before.retry_after_ms), Ok(()));
                now_ms += before.retry_after_ms;
            } else {
                let passed = (0..10).take_while(|_| limiter.admit(&charge, now_ms).is_ok()).count();
                prop_assert!(passed <= 5);
            }
        }
    }

    #[test]
    fn any_time_will_do(times in vec(any::<i64>(), 1..20), cost in any::<u32>()) {
        let mut limiter = Limiter::new([(Scope::Room, limit(0.001, 1_000_000))], 10);
        for now_ms in times {
            let _ = limiter.admit(&[(Key::Room("a"), cost)], now_ms);
        }
    }
}

#[test]
fn wrong_limits() {
    for per_second in [0.0, -1.0, 0.0009, 1e6 + 1.0, f64::NAN, f64::INFINITY] {
        assert!(Limit::new(per_second, 1).is_err(), "{per_second}");
    }
    for burst_count in [0, 1_000_001, u32::MAX] {
        assert!(Limit::new(1.0, burst_count).is_err(), "{burst_count}");
    }
}

/// L6: made-up names cost no memory, give nobody a full bucket, and have no lasting effect.
#[test]
fn made_up_names() {
    const CAPACITY: usize = 2_000;
    let limits = [
        (Scope::Sender, limit(0.1, 2)),
        (Scope::Server, limit(0.1, 2)),
    ];
    let mut limiter = Limiter::new(limits, CAPACITY);
    let known = [(Key::Server("known"), 1)];
    assert!(limiter.admit(&known, START_MS).is_ok());
    assert!(limiter.admit(&known, START_MS).is_ok());
    let wait = limiter.admit(&known, START_MS).expect_err("used up");

    let late = [(Key::Sender("late", "room"), 1)];
    let mut passed = 0;
    for number in 0..200_000 {
        let name = format!("@{number}:flood");
        let _ = limiter.admit(&[(Key::Sender(&name, "room"), 1)], START_MS);
        assert!(limiter.len() <= CAPACITY);
        // A key that came too late for its own bucket still gets no more than its limit.
        if limiter.len() == CAPACITY {
            passed += usize::from(limiter.admit(&late, START_MS).is_ok());
        }
    }
    assert!(passed <= 2, "{passed}");
    assert_eq!(limiter.admit(&known, START_MS), Err(wait));
    // All are full again after 20 s.
    let after_ms = START_MS + 21_000;
    assert!(limiter
        .admit(&[(Key::Sender("new", "room"), 2)], after_ms)
        .is_ok());
    assert!(
        limiter.len() <= 2,
        "the limiter keeps full buckets: {}",
        limiter.len()
    );
}

#[test]
fn keys_do_not_meet() {
    let limits = [
        (Scope::ServerInRoom, limit(1.0, 1)),
        (Scope::Sender, limit(1.0, 1)),
    ];
    let mut limiter = Limiter::new(limits, 100);
    for key in [
        Key::ServerInRoom("ab", "c"),
        Key::ServerInRoom("a", "bc"),
        Key::Sender("ab", "c"),
        Key::Sender("a", "bc"),
    ] {
        assert!(limiter.admit(&[(key, 1)], START_MS).is_ok(), "{key:?}");
    }
    assert_eq!(limiter.len(), 4);
}

/// Sometimes an extreme, else a plausible time.
fn any_time() -> impl Strategy<Value = i64> {
    let edge = prop::sample::select(vec![i64::MIN, i64::MIN + 1, -1, 0, i64::MAX - 1, i64::MAX]);
    prop_oneof![edge, START_MS - HOUR_MS..START_MS + HOUR_MS]
}

fn charges() -> impl Strategy<Value = Vec<(Key<'static>, u32)>> {
    let charge = (0..5usize, 0..3usize, 0..3usize, 0..8u32);
    vec(
        charge.prop_map(|(s, a, b, cost)| (key(s, a, b), cost)),
        0..6,
    )
}

fn all_limits() -> impl Strategy<Value = Vec<(Scope, u32, u32)>> {
    vec((1..50u32, 1..12u32), 5).prop_map(|limits| {
        let with_scope = |(scope, (rate, burst))| (scope, rate, burst);
        Scope::ALL.into_iter().zip(limits).map(with_scope).collect()
    })
}

fn limiter_of(limits: &[(Scope, u32, u32)]) -> Limiter {
    let of = |(scope, rate, burst): &(Scope, u32, u32)| (*scope, limit(f64::from(*rate), *burst));
    Limiter::new(limits.iter().map(of), 10_000)
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(REGRESSIONS))),
        ..ProptestConfig::default()
    })]

    /// The same for each key if a decision is on many keys, and if the clock goes back: the steady time stands still.
    #[test]
    fn never_more_for_any_key(
        steps in vec((charges(), prop_oneof![9 => 0..300i64, 1 => -HOUR_MS..0]), 1..100),
        limits in all_limits(),
    ) {
        let mut limiter = limiter_of(&limits);
        let (mut now_ms, mut own_ms) = (START_MS, START_MS);
        let mut admitted: BTreeMap<Key<'static>, Vec<(i64, u32)>> = BTreeMap::new();
        for (charges, step_ms) in steps {
            now_ms += step_ms;
            own_ms += step_ms.max(0);
            if limiter.admit(&charges, now_ms).is_ok() {
                let mut costs: BTreeMap<Key<'static>, u32> = BTreeMap::new();
                for (key, cost) in charges {
                    *costs.entry(key).or_default() += cost;
                }
                for (key, cost) in costs {
                    admitted.entry(key).or_default().push((own_ms, cost));
                }
            }
        }
        for (key, admitted) in admitted {
            let (_, rate, burst) = limits[key.scope() as usize];
            for from in 0..admitted.len() {
                let (mut sum, mut largest) = (0, burst);
                for (at_ms, cost) in &admitted[from..] {
                    sum += cost;
                    largest = largest.max(*cost);
                    let window_s = (at_ms - admitted[from].0) as f64 / 1000.0;
                    let most = f64::from(largest) + f64::from(rate) * window_s + 1e-6;
                    prop_assert!(f64::from(sum) <= most, "{:?}: {} > {}", key, sum, most);
                }
            }
        }
    }

    /// A refusal changes nothing: a limiter that never sees what another one refuses decides as that one does.
    #[test]
    fn a_refusal_leaves_no_trace(
        steps in vec((charges(), 0..300i64), 1..100),
        limits in all_limits(),
    ) {
        let (mut asked, mut spared) = (limiter_of(&limits), limiter_of(&limits));
        let mut now_ms = START_MS;
        for (charges, step_ms) in steps {
            now_ms += step_ms;
            if asked.admit(&charges, now_ms).is_ok() {
                prop_assert_eq!(spared.admit(&charges, now_ms), Ok(()));
            }
            prop_assert_eq!(asked.len(), spared.len());
        }
    }

    /// Many charges compete for the same keys. Each retries when its refusal says, and each is admitted in the end.
    #[test]
    fn all_who_wait_get_through(waiting in vec(charges(), 1..25), limits in all_limits()) {
        let mut limiter = limiter_of(&limits);
        let mut due: BTreeMap<(i64, usize), Vec<(Key<'static>, u32)>> = BTreeMap::new();
        due.extend(waiting.into_iter().enumerate().map(|(at, charges)| ((START_MS, at), charges)));
        let mut tries = 0;
        let most = due.len() * (due.len() + 1);
        while let Some(((now_ms, at), charges)) = due.pop_first() {
            tries += 1;
            prop_assert!(tries <= most, "{} tries", tries);
            if let Err(refusal) = limiter.admit(&charges, now_ms) {
                prop_assert!(refusal.retry_after_ms >= 1);
                due.insert((now_ms + refusal.retry_after_ms, at), charges);
            }
        }
    }

    #[test]
    fn same_as_governor_by_key(
        steps in vec((0..3usize, 1..6u32, 0..50i64), 1..200),
        interval_ms in prop::sample::select(vec![1u32, 2, 4, 5, 8, 10, 20, 25, 40]),
        burst in 5..9u32,
    ) {
        let quota = Quota::with_period(Duration::from_millis(interval_ms.into()))
            .expect("not zero")
            .allow_burst(NonZeroU32::new(burst).expect("not zero"));
        let clock = FakeRelativeClock::default();
        let oracle = RateLimiter::<usize, _, _, _>::hashmap_with_clock(quota, clock.clone());
        let limits = [(Scope::User, limit(1000.0 / f64::from(interval_ms), burst))];
        let mut limiter = Limiter::new(limits, 100);
        let mut now_ms = START_MS;
        for (name, cost, step_ms) in steps {
            now_ms += step_ms;
            clock.advance(Duration::from_millis(step_ms as u64));
            let found = limiter.admit(&[(Key::User(NAMES[name]), cost)], now_ms).is_ok();
            let cost = NonZeroU32::new(cost).expect("not zero");
            prop_assert_eq!(found, matches!(oracle.check_key_n(&name, cost), Ok(Ok(()))));
        }
    }

    #[test]
    fn no_time_is_too_far(
        steps in vec((any_time(), prop_oneof![0..9u32, Just(u32::MAX)]), 1..40),
        rate in prop::sample::select(vec![0.001, 1.0, 1e6]),
        burst in prop::sample::select(vec![1, 5, 1_000_000]),
    ) {
        let mut limiter = Limiter::new([(Scope::Room, limit(rate, burst))], 10);
        for (now_ms, cost) in steps {
            // The key occurs twice in one decision: the sum may not overflow either.
            let charges = [(Key::Room("a"), cost), (Key::Room("a"), cost)];
            if let Err(refusal) = limiter.admit(&charges, now_ms) {
                prop_assert!(refusal.retry_after_ms >= 1);
            }
        }
    }
}

/// L6: a flood leaves the buckets of known keys exactly as they were, in each scope.
#[test]
fn a_flood_moves_nobody() {
    const CAPACITY: usize = 2_000;
    let limits = Scope::ALL.map(|scope| (scope, limit(0.1, 8)));
    let mut flooded: Limiter<BuildHasherDefault<DefaultHasher>> =
        Limiter::with_hasher(limits, CAPACITY, BuildHasherDefault::default());
    let mut calm = Limiter::new(limits, CAPACITY);
    let known: Vec<Key<'static>> = (0..5).flat_map(|s| [key(s, 0, 1), key(s, 1, 2)]).collect();
    for (at, key) in known.iter().enumerate() {
        let cost = 1 + u32::try_from(at).expect("small") % 8;
        assert!(flooded.admit(&[(*key, cost)], START_MS).is_ok());
        assert!(calm.admit(&[(*key, cost)], START_MS).is_ok());
    }
    for number in 0..200_000 {
        let name = format!("{number}.flood");
        let keys = [
            Key::Server(&name),
            Key::ServerInRoom(&name, "b"),
            Key::Sender(&name, "b"),
            Key::Room(&name),
            Key::User(&name),
        ];
        let _ = flooded.admit(&[(keys[number % 5], 8)], START_MS);
        assert!(flooded.len() <= CAPACITY);
    }
    // The refusal of a cost over the burst says how far from full the bucket is. The known buckets are full before any
    // of the flood's.
    for now_ms in [START_MS, START_MS + 5_001] {
        for key in &known {
            let probe = [(*key, 9)];
            let found = flooded.admit(&probe, now_ms);
            assert!(found.is_err(), "{key:?}");
            assert_eq!(found, calm.admit(&probe, now_ms), "{key:?}");
        }
    }
}

/// L6: a key gains nothing by entering and leaving the table. Over many waves it is admitted no faster than its limit.
#[test]
fn no_gain_from_overflow() {
    const CAPACITY: usize = 500;
    let (rate, burst) = (1.0, 3);
    let mut limiter: Limiter<BuildHasherDefault<DefaultHasher>> = Limiter::with_hasher(
        [(Scope::Sender, limit(rate, burst))],
        CAPACITY,
        BuildHasherDefault::default(),
    );
    let greedy = [(Key::Sender("greedy", "room"), 1)];
    let mut passed: Vec<i64> = Vec::new();
    for wave in 0..40_i64 {
        // Between the waves some buckets become full, and the table drops them. The greedy key's is among them.
        let start_ms = START_MS + wave * 2_300;
        for number in 0..1_500_i64 {
            let now_ms = start_ms + number;
            let name = format!("@{number}:wave{wave}");
            let _ = limiter.admit(&[(Key::Sender(&name, "room"), 1)], now_ms);
            if limiter.admit(&greedy, now_ms).is_ok() {
                passed.push(now_ms);
            }
            assert!(limiter.len() <= CAPACITY);
        }
    }
    assert!(passed.len() > 40, "it is shut out: {}", passed.len());
    for (first, from_ms) in passed.iter().enumerate() {
        for (last, to_ms) in passed.iter().enumerate().skip(first) {
            let most = f64::from(burst) + rate * (to_ms - from_ms) as f64 / 1000.0;
            assert!((last - first + 1) as f64 <= most + 1e-6);
        }
    }
}
