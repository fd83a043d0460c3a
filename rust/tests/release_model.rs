//! The release queue against a list, and what it promises to those who wait.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use _core::limiter::{Limit, Limiter, Scope};
use _core::release::{Deferred, ReleaseQueue};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

const START_MS: i64 = 1_800_000_000_000;
const FAR_MS: i64 = START_MS + 100 * 3_600_000;

#[derive(Clone, Debug)]
struct Event {
    id: String,
    room: String,
    server: String,
    sender: String,
    expires_at_ms: i64,
}

impl Event {
    fn deferred(&self) -> Deferred<'_> {
        Deferred {
            event_id: &self.id,
            room_id: &self.room,
            server: &self.server,
            sender: &self.sender,
            expires_at_ms: self.expires_at_ms,
        }
    }
}

fn event(id: usize, room: usize, server: usize, sender: usize, expires_at_ms: i64) -> Event {
    Event {
        id: format!("${id}"),
        room: format!("!{room}"),
        server: format!("s{server}"),
        sender: format!("@{sender}:s{server}"),
        expires_at_ms,
    }
}

fn limiter(limits: &[(Scope, f64, u32)]) -> Limiter {
    let limits = limits
        .iter()
        .map(|(scope, rate, burst)| (*scope, Limit::new(*rate, *burst).expect("valid")));
    Limiter::new(limits, 10_000)
}

#[derive(Clone, Debug)]
enum Action {
    Arrive(usize, usize, usize, i64),
    Remove(usize),
    Take(usize),
    Expire,
    Pass(i64),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        6 => (0..3usize, 0..3usize, 0..4usize, 1..60_000i64)
            .prop_map(|(room, server, sender, for_ms)| Action::Arrive(room, server, sender, for_ms)),
        1 => (0..200usize).prop_map(Action::Remove),
        2 => (0..20usize).prop_map(Action::Take),
        1 => Just(Action::Expire),
        3 => (0..3_000i64).prop_map(Action::Pass),
    ];
    vec(action, 1..200)
}

fn some_limits() -> impl Strategy<Value = Vec<(Scope, f64, u32)>> {
    let one = proptest::option::of((1..20u32, 1..6u32));
    (one.clone(), one.clone(), one.clone(), one).prop_map(|(a, b, c, d)| {
        [
            Scope::Server,
            Scope::ServerInRoom,
            Scope::Sender,
            Scope::Room,
        ]
        .into_iter()
        .zip([a, b, c, d])
        .filter_map(|(scope, limit)| limit.map(|(r, b)| (scope, f64::from(r), b)))
        .collect()
    })
}

/// The bucket of this scope that the event takes from.
fn bucket(scope: Scope, event: &Event) -> String {
    match scope {
        Scope::Server => event.server.clone(),
        Scope::ServerInRoom => format!("{} {}", event.server, event.room),
        Scope::Sender => format!("{} {}", event.sender, event.room),
        _ => event.room.clone(),
    }
}

fn assert_within_limits(limits: &[(Scope, f64, u32)], delivered: &[(i64, Event)]) {
    for (scope, rate, burst) in limits {
        let mut times: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for (at_ms, event) in delivered {
            times.entry(bucket(*scope, event)).or_default().push(*at_ms);
        }
        for at_ms in times.values() {
            for (first, from_ms) in at_ms.iter().enumerate() {
                for (last, to_ms) in at_ms.iter().enumerate().skip(first) {
                    let most = f64::from(*burst) + rate * (to_ms - from_ms) as f64 / 1000.0;
                    assert!((last - first + 1) as f64 <= most + 1e-6, "{scope:?}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("rust/tests/proptest-regressions/release_model.txt"))),
        ..ProptestConfig::default()
    })]

    /// Nothing is lost, nothing comes twice, no limit is passed, whatever happens.
    #[test]
    fn random_actions(actions in actions(), limits in some_limits()) {
        let mut limiter = limiter(&limits);
        let mut queue = ReleaseQueue::new();
        let mut now_ms = START_MS;
        let mut events: Vec<Event> = Vec::new();
        let mut waiting: BTreeSet<usize> = BTreeSet::new();
        let mut delivered: Vec<(i64, Event)> = Vec::new();
        let number = |id: &str| id[1..].parse::<usize>().expect("ours");
        for action in actions {
            match action {
                Action::Arrive(room, server, sender, for_ms) => {
                    let new = event(events.len(), room, server, sender, now_ms + for_ms);
                    match queue.admit(&mut limiter, &new.room, &new.server, &new.sender, now_ms) {
                        Ok(()) => delivered.push((now_ms, new.clone())),
                        Err(scope) => {
                            prop_assert!(limits.iter().any(|(limited, _, _)| *limited == scope)
                                || !waiting.is_empty());
                            prop_assert!(queue.add(new.deferred()));
                            prop_assert!(!queue.add(new.deferred()), "known already");
                            waiting.insert(events.len());
                        }
                    }
                    events.push(new);
                }
                Action::Remove(id) => {
                    prop_assert_eq!(queue.remove(&format!("${id}")), waiting.remove(&id));
                }
                Action::Take(most) => {
                    let taken = queue.take(&mut limiter, now_ms, most);
                    prop_assert!(taken.len() <= most);
                    if taken.len() < most {
                        // Nothing more to do now: no busy loop.
                        prop_assert!(queue.next_due_ms(now_ms).is_none_or(|due_ms| due_ms > now_ms)
                            || waiting.iter().any(|id| events[*id].expires_at_ms <= now_ms));
                    }
                    for id in taken {
                        prop_assert!(waiting.remove(&number(&id)), "waited, and once only");
                        delivered.push((now_ms, events[number(&id)].clone()));
                    }
                }
                Action::Expire => {
                    let expired: BTreeSet<usize> =
                        queue.expire(now_ms, 1_000).iter().map(|id| number(id)).collect();
                    let due: BTreeSet<usize> = waiting
                        .iter()
                        .copied()
                        .filter(|id| events[*id].expires_at_ms <= now_ms)
                        .collect();
                    prop_assert_eq!(&expired, &due);
                    waiting.retain(|id| !expired.contains(id));
                }
                Action::Pass(ms) => now_ms += ms,
            }
            prop_assert_eq!(queue.len(), waiting.len());
            for server in 0..3 {
                let name = format!("s{server}");
                let expected = waiting.iter().filter(|id| events[**id].server == name).count();
                prop_assert_eq!(queue.waiting(&name), expected);
            }
        }
        // Sleeping until it says so, everything gets out.
        let mut steps = 0;
        while let Some(due_ms) = queue.next_due_ms(now_ms) {
            prop_assert!(due_ms >= now_ms);
            now_ms = due_ms;
            queue.expire(now_ms, 1_000);
            for id in queue.take(&mut limiter, now_ms, 1_000) {
                delivered.push((now_ms, events[number(&id)].clone()));
            }
            steps += 1;
            prop_assert!(steps < 5_000, "ends");
        }
        prop_assert!(queue.is_empty());
        assert_within_limits(&limits, &delivered);
    }

    /// A releaser that sleeps until it is told misses nothing that one who looks all the time sees.
    #[test]
    fn never_late(
        events in vec((0..2usize, 0..3usize, 0..3usize, 0..9_000i64), 1..60),
        limits in some_limits(),
    ) {
        let run = |told: bool| {
            let mut limiter = limiter(&limits);
            let mut queue = ReleaseQueue::new();
            for (id, (room, server, sender, ms)) in events.iter().enumerate() {
                queue.add(event(id, *room, *server, *sender, FAR_MS + ms).deferred());
            }
            let mut count_by_ms: Vec<(i64, usize)> = Vec::new();
            let mut now_ms = START_MS;
            let mut count = 0;
            while !queue.is_empty() && now_ms < START_MS + 200_000 {
                count += queue.take(&mut limiter, now_ms, 1_000).len();
                count_by_ms.push((now_ms, count));
                now_ms = if told { queue.next_due_ms(now_ms).unwrap_or(now_ms) } else { now_ms + 1 };
            }
            (queue.is_empty(), count_by_ms)
        };
        let (done_told, told) = run(true);
        let (done_always, always) = run(false);
        prop_assert_eq!(done_told, done_always);
        let always: HashMap<i64, usize> = always.into_iter().collect();
        for (at_ms, count) in told {
            if let Some(expected) = always.get(&at_ms) {
                prop_assert_eq!(count, *expected, "at {} ms", at_ms - START_MS);
            }
        }
    }
}

/// Takes everything that waits, whenever it may; in order, with the times.
fn drain(queue: &mut ReleaseQueue, limiter: &mut Limiter) -> Vec<(i64, String)> {
    let mut now_ms = START_MS;
    let mut released = Vec::new();
    while let Some(due_ms) = queue.next_due_ms(now_ms) {
        now_ms = due_ms;
        released.extend(
            queue
                .take(limiter, now_ms, 1_000)
                .into_iter()
                .map(|id| (now_ms, id)),
        );
    }
    released
}

/// D7: the servers of a room take turns.
#[test]
fn servers_take_turns() {
    let mut limiter = limiter(&[(Scope::Room, 10.0, 1)]);
    let mut queue = ReleaseQueue::new();
    let mut servers = HashMap::new();
    for id in 0..130 {
        // One that has a hundred waiting, then two that have come late with a few.
        let server = if id < 100 { 0 } else { 1 + id % 2 };
        let event = event(id, 0, server, id % 5, FAR_MS);
        servers.insert(event.id.clone(), server);
        queue.add(event.deferred());
    }
    let order: Vec<usize> = drain(&mut queue, &mut limiter)
        .iter()
        .map(|(_, id)| servers[id])
        .collect();
    assert_eq!(order.len(), 130);
    for turns in order[..45].chunks(3) {
        let mut turns = turns.to_vec();
        turns.sort_unstable();
        assert_eq!(turns, [0, 1, 2]);
    }
    assert!(order[45..].iter().all(|server| *server == 0));
}

/// Of a server's events in a room the one that expires first goes first.
#[test]
fn earliest_deadline_first() {
    let mut limiter = limiter(&[(Scope::ServerInRoom, 10.0, 1)]);
    let mut queue = ReleaseQueue::new();
    let deadlines = [50, 20, 90, 20, 70, 10];
    for (id, deadline) in deadlines.into_iter().enumerate() {
        queue.add(event(id, 0, 0, id % 3, FAR_MS + deadline).deferred());
    }
    let order: Vec<String> = drain(&mut queue, &mut limiter)
        .into_iter()
        .map(|(_, id)| id)
        .collect();
    assert_eq!(order, ["$5", "$1", "$3", "$0", "$4", "$2"]);
}

/// Whoever a limit holds up holds up nobody else.
#[test]
fn held_up_alone() {
    for scope in [Scope::Sender, Scope::ServerInRoom, Scope::Server] {
        let mut limiter = limiter(&[(scope, 0.01, 1)]);
        let mut queue = ReleaseQueue::new();
        for id in 0..50 {
            queue.add(event(id, 0, 0, 0, FAR_MS).deferred());
        }
        let beside = match scope {
            Scope::Sender => event(50, 0, 0, 1, FAR_MS + 1),
            Scope::ServerInRoom => event(50, 1, 0, 0, FAR_MS + 1),
            _ => event(50, 0, 1, 0, FAR_MS + 1),
        };
        queue.add(beside.deferred());
        let taken = queue.take(&mut limiter, START_MS, 100);
        assert_eq!(taken, ["$0", "$50"], "{scope:?}");
    }
}

/// A new event may not overtake what waits for the same allowance, and passes what does not.
#[test]
fn no_overtaking() {
    let cases: [(Scope, Event, Event); 4] = [
        (
            Scope::Sender,
            event(9, 0, 0, 0, FAR_MS),
            event(9, 0, 0, 1, FAR_MS),
        ),
        (
            Scope::ServerInRoom,
            event(9, 0, 0, 1, FAR_MS),
            event(9, 1, 0, 0, FAR_MS),
        ),
        (
            Scope::Server,
            event(9, 1, 0, 0, FAR_MS),
            event(9, 0, 1, 0, FAR_MS),
        ),
        (
            Scope::Room,
            event(9, 0, 1, 0, FAR_MS),
            event(9, 1, 0, 0, FAR_MS),
        ),
    ];
    for (scope, same, other) in cases {
        let mut limiter = limiter(&[(scope, 1.0, 1)]);
        let mut queue = ReleaseQueue::new();
        for id in 0..3 {
            queue.add(event(id, 0, 0, 0, FAR_MS).deferred());
        }
        assert_eq!(queue.take(&mut limiter, START_MS, 10), ["$0"]);
        // The bucket has a drop again, but that is for those who wait.
        let now_ms = START_MS + 1_000;
        assert_eq!(
            queue.admit(&mut limiter, &same.room, &same.server, &same.sender, now_ms),
            Err(scope)
        );
        assert_eq!(
            queue.admit(
                &mut limiter,
                &other.room,
                &other.server,
                &other.sender,
                now_ms
            ),
            Ok(())
        );
        assert_eq!(queue.take(&mut limiter, now_ms, 10), ["$1"]);
    }
}

#[test]
fn without_limits_all_pass() {
    let mut limiter = limiter(&[]);
    let mut queue = ReleaseQueue::new();
    for id in 0..100 {
        queue.add(event(id, id % 3, id % 4, id % 5, FAR_MS).deferred());
    }
    assert_eq!(queue.take(&mut limiter, START_MS, 1_000).len(), 100);
    assert_eq!(
        queue.admit(&mut limiter, "!0", "s0", "@0:s0", START_MS),
        Ok(())
    );
    assert_eq!(queue.next_due_ms(START_MS), None);
}
