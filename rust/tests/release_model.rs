//! The release queue against a list, and its promises for deferred events.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use _core::limiter::{Limit, Limiter, Scope};
use _core::release::{Deferred, ReleaseQueue};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

const REGRESSIONS: &str = "rust/tests/proptest-regressions/release_model.txt";
const START_MS: i64 = 1_800_000_000_000;
const FAR_MS: i64 = START_MS + 100 * 3_600_000;

#[derive(Clone, Debug)]
struct Event {
    id: String,
    room: String,
    server: String,
    sender: String,
    expires_at_ms: i64,
    key: Option<i64>,
    newness_ms: i64,
}

impl Event {
    fn deferred(&self) -> Deferred<'_> {
        Deferred {
            event_id: &self.id,
            room_id: &self.room,
            server: &self.server,
            sender: &self.sender,
            expires_at_ms: self.expires_at_ms,
            key: self.key,
            newness_ms: self.newness_ms,
            is_exempt: false,
        }
    }

    /// Key 0 stands for none.
    fn of_key(self, key: i64, newness_ms: i64) -> Self {
        Self {
            key: (key > 0).then_some(key),
            newness_ms,
            ..self
        }
    }

    fn newness(&self) -> (i64, &str) {
        (self.newness_ms, &self.id)
    }
}

fn event(id: usize, room: usize, server: usize, sender: usize, expires_at_ms: i64) -> Event {
    Event {
        id: format!("${id}"),
        room: format!("!{room}"),
        server: format!("s{server}"),
        sender: format!("@{sender}:s{server}"),
        expires_at_ms,
        key: None,
        newness_ms: expires_at_ms,
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
    Arrive(usize, usize, usize, i64, i64),
    Remove(usize),
    Take(usize),
    Expire,
    Pass(i64),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        6 => (0..3usize, 0..3usize, 0..4usize, 1..60_000i64, 0..4i64).prop_map(
            |(room, server, sender, for_ms, key)| Action::Arrive(room, server, sender, for_ms, key)
        ),
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
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(REGRESSIONS))),
        ..ProptestConfig::default()
    })]

    /// The queue loses no event, releases none twice and exceeds no limit, whatever happens.
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
                Action::Arrive(room, server, sender, for_ms, key) => {
                    let new = event(events.len(), room, server, sender, now_ms + for_ms)
                        .of_key(key, now_ms + for_ms % 7_000);
                    match queue.admit(&mut limiter, &new.room, &new.server, &new.sender, false, now_ms) {
                        Ok(()) => delivered.push((now_ms, new.clone())),
                        Err(scope) => {
                            prop_assert!(limits.iter().any(|(limited, _, _)| *limited == scope)
                                || !waiting.is_empty());
                            prop_assert!(queue.add(new.deferred()));
                            prop_assert!(!queue.add(new.deferred()), "it is deferred already");
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
                        // There is nothing more to do now: no busy loop.
                        prop_assert!(queue.next_due_ms(now_ms).is_none_or(|due_ms| due_ms > now_ms)
                            || waiting.iter().any(|id| events[*id].expires_at_ms <= now_ms));
                    }
                    for id in taken {
                        prop_assert!(waiting.remove(&number(&id)), "it was deferred, and released once");
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
        // A caller that sleeps until `next_due_ms` gets every event.
        let mut steps = 0;
        while let Some(due_ms) = queue.next_due_ms(now_ms) {
            prop_assert!(due_ms >= now_ms);
            now_ms = due_ms;
            queue.expire(now_ms, 1_000);
            for id in queue.take(&mut limiter, now_ms, 1_000) {
                delivered.push((now_ms, events[number(&id)].clone()));
            }
            steps += 1;
            prop_assert!(steps < 5_000, "the loop does not end");
        }
        prop_assert!(queue.is_empty());
        assert_within_limits(&limits, &delivered);
    }

    /// A caller that sleeps until `next_due_ms` releases the same as one that calls all the time.
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

/// Releases all deferred events, each as early as possible. Returns them in order, with the times.
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
        // One server has a hundred deferred events. Then two servers come late with a few.
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

/// A server's turn in a room goes to the sender who has the earliest deadline. What the sender releases is its newest.
#[test]
fn senders_go_by_deadline_and_their_events_by_newness() {
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
    assert_eq!(order, ["$2", "$4", "$0", "$3", "$1", "$5"]);
}

/// A server or sender that has reached its limit delays nobody else.
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
        assert_eq!(taken, ["$9", "$50"], "{scope:?}");
    }
}

/// A new event may not overtake a deferred event that needs the same allowance. It may overtake any other.
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
        assert_eq!(queue.take(&mut limiter, START_MS, 10), ["$2"]);
        // The bucket has an allowance again, but that is for the deferred events.
        let now_ms = START_MS + 1_000;
        assert_eq!(
            queue.admit(
                &mut limiter,
                &same.room,
                &same.server,
                &same.sender,
                false,
                now_ms
            ),
            Err(scope)
        );
        assert_eq!(
            queue.admit(
                &mut limiter,
                &other.room,
                &other.server,
                &other.sender,
                false,
                now_ms
            ),
            Ok(())
        );
        assert_eq!(queue.take(&mut limiter, now_ms, 10), ["$1"]);
    }
}

/// An event that was just added has not tried its limits yet. The allowance of one event is kept for it, no more.
#[test]
fn what_was_just_added_is_kept_its_turn_and_holds_up_nobody_else() {
    let admit = |limits: &[(Scope, f64, u32)], new: &Event| {
        let mut limiter = limiter(limits);
        let mut queue = ReleaseQueue::new();
        queue.add(event(0, 0, 0, 0, FAR_MS).deferred());
        queue.add(event(1, 0, 1, 0, FAR_MS).deferred());
        queue.admit(
            &mut limiter,
            &new.room,
            &new.server,
            &new.sender,
            false,
            START_MS,
        )
    };
    let other_server = event(9, 0, 2, 0, FAR_MS);
    assert_eq!(admit(&[], &other_server), Ok(()));
    assert_eq!(admit(&[(Scope::Server, 1.0, 1)], &other_server), Ok(()));
    assert_eq!(admit(&[(Scope::Room, 1.0, 3)], &other_server), Ok(()));
    assert_eq!(
        admit(&[(Scope::Room, 1.0, 2)], &other_server),
        Err(Scope::Room)
    );
    let other_sender = event(9, 0, 0, 1, FAR_MS);
    for scope in [Scope::Server, Scope::ServerInRoom] {
        assert_eq!(admit(&[(scope, 1.0, 2)], &other_sender), Ok(()));
        assert_eq!(admit(&[(scope, 1.0, 1)], &other_sender), Err(scope));
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
        queue.admit(&mut limiter, "!0", "s0", "@0:s0", false, START_MS),
        Ok(())
    );
    assert_eq!(queue.next_due_ms(START_MS), None);
}

type Bucket = (Scope, String);

/// The buckets, by plain arithmetic.
struct Buckets {
    limits: Vec<(Scope, i128, i128)>,
    full_at_ns: HashMap<Bucket, i128>,
}

impl Buckets {
    fn new(limits: &[(Scope, f64, u32)]) -> Self {
        let exact = |(scope, rate, burst): &(Scope, f64, u32)| {
            (*scope, (1e9 / rate).ceil() as i128, i128::from(*burst))
        };
        Self {
            limits: limits.iter().map(exact).collect(),
            full_at_ns: HashMap::new(),
        }
    }

    /// How long each of the event's buckets would delay it.
    fn waits(&self, event: &Event, now_ms: i64) -> Vec<(Bucket, i128)> {
        let now_ns = i128::from(now_ms) * 1_000_000;
        let wait = |(scope, interval_ns, burst): &(Scope, i128, i128)| {
            let of = (*scope, bucket(*scope, event));
            let full_at_ns = self.full_at_ns.get(&of).copied().unwrap_or(now_ns);
            let wait_ns = (full_at_ns - now_ns).max(0) - (burst - 1) * interval_ns;
            (of, wait_ns.max(0))
        };
        self.limits.iter().map(wait).collect()
    }

    fn passes(&self, event: &Event, now_ms: i64) -> bool {
        self.waits(event, now_ms)
            .iter()
            .all(|(_, wait_ns)| *wait_ns == 0)
    }

    fn charge(&mut self, event: &Event, now_ms: i64) {
        let now_ns = i128::from(now_ms) * 1_000_000;
        for (scope, interval_ns, _) in &self.limits {
            let of = (*scope, bucket(*scope, event));
            let full_at_ns = self.full_at_ns.entry(of).or_insert(now_ns);
            *full_at_ns = now_ns.max(*full_at_ns) + interval_ns;
        }
    }
}

/// In how long that many events are through, of those that one bucket of this scope delays.
fn through_ms(limits: &[(Scope, f64, u32)], scope: Scope, events: usize) -> i64 {
    let of_scope = limits.iter().find(|(limited, _, _)| *limited == scope);
    let interval_ms = |rate: f64| ((1e9 / rate).ceil() / 1e6).ceil() as i64;
    of_scope.map_or(0, |(_, rate, _)| interval_ms(*rate) * events as i64)
}

type OfKey = (String, Option<i64>);

/// The order of each sender's events, by going through all of them.
#[derive(Default)]
struct Naive {
    waiting: Vec<Event>,
    /// By room and sender: the deadlines that its turns go by, and the keys that it was released of, with the turn and
    /// the newest of them.
    deadlines: HashMap<String, BTreeSet<(i64, usize)>>,
    served: HashMap<OfKey, (usize, (i64, String))>,
    rescued: BTreeSet<String>,
    turns: usize,
}

impl Naive {
    fn of(event: &Event) -> String {
        format!("{} {}", event.room, event.sender)
    }

    fn of_sender(&self, event: &Event) -> Vec<&Event> {
        let of = Self::of(event);
        let events = self.waiting.iter();
        events.filter(|other| Self::of(other) == of).collect()
    }

    /// What the next turn of the event's sender goes by: the earliest deadline that no release has used up; or, if an
    /// event ends before that and is at risk, when this event must have its turn. `own_ms`: how long the limit on a
    /// sender has an event take.
    fn deadline(&self, event: &Event, safe_after_ms: i64, own_ms: i64) -> (i64, usize) {
        let of_sender = self.of_sender(event);
        let turn_by_ms = |end_ms: i64| end_ms - own_ms * of_sender.len() as i64;
        let expiring = of_sender.iter().map(|event| Self::urgency(event)).min();
        let (end_ms, id) = expiring.expect("waits");
        let deadline = *self.deadlines[&Self::of(event)].first().expect("waits");
        if (end_ms, id) < deadline && turn_by_ms(end_ms) <= safe_after_ms {
            return (turn_by_ms(end_ms), id);
        }
        deadline
    }

    fn urgency(event: &Event) -> (i64, usize) {
        (event.expires_at_ms, event.id[1..].parse().expect("ours"))
    }

    fn add(&mut self, event: &Event) {
        let deadlines = self.deadlines.entry(Self::of(event)).or_default();
        deadlines.insert(Self::urgency(event));
        self.waiting.push(event.clone());
    }

    fn expired(&mut self, event: &Event) {
        let deadlines = self.deadlines.get_mut(&Self::of(event)).expect("waits");
        let own = deadlines.iter().find(|d| **d >= Self::urgency(event));
        let own = *own.expect("each event has a deadline that is not before its own");
        deadlines.remove(&own);
        self.take_out(event);
    }

    fn take_out(&mut self, event: &Event) {
        self.waiting.retain(|other| other.id != event.id);
        let of = Self::of(event);
        let mut of_sender = self.waiting.iter().filter(|other| Self::of(other) == of);
        if of_sender.clone().next().is_none() {
            self.rescued.remove(&of);
        }
        if !of_sender.any(|other| other.key == event.key) {
            self.served.remove(&(of, event.key));
        }
    }

    fn released(&mut self, event: &Event) {
        let of = Self::of(event);
        self.deadlines.get_mut(&of).expect("waits").pop_first();
        self.turns += 1;
        if event.key.is_some() {
            let newness = (event.newness_ms, event.id.clone());
            let served = self.served.entry((of, event.key)).or_default();
            *served = (self.turns, newness.max(served.1.clone()));
        }
        self.take_out(event);
    }

    fn is_superseded(&self, event: &Event) -> bool {
        let of = (Self::of(event), event.key);
        let newer =
            |other: &Event| (Self::of(other), other.key) == of && other.newness() > event.newness();
        let released = self.served.get(&of).map(|(_, (ms, id))| (*ms, id.as_str()));
        event.key.is_some() && (self.waiting.iter().any(newer) || released > Some(event.newness()))
    }

    /// The event of the sender whose turn it is, and notes if it is the one that expires first.
    fn next(&mut self, event: &Event, safe_after_ms: i64, limits: &[(Scope, f64, u32)]) -> String {
        let of_sender = self.of_sender(event);
        let of = Self::of(event);
        let expiring = of_sender.iter().min_by_key(|e| Self::urgency(e));
        let expiring = expiring.expect("waits");
        let own_ms = through_ms(limits, Scope::Sender, of_sender.len());
        let has_had_its_turn =
            self.rescued.contains(&of) && of_sender.iter().any(|event| !self.is_superseded(event));
        if expiring.expires_at_ms <= safe_after_ms + own_ms && !has_had_its_turn {
            let id = expiring.id.clone();
            self.rescued.insert(of);
            return id;
        }
        let turn = |event: &Event| self.served.get(&(of.clone(), event.key)).map_or(0, |s| s.0);
        let place = |event: &Event| {
            let newest_first = Reverse((event.newness_ms, event.id.clone()));
            let is_superseded = self.is_superseded(event);
            (
                is_superseded,
                if is_superseded { 0 } else { turn(event) },
                newest_first,
            )
        };
        let next = of_sender.iter().min_by_key(|event| place(event));
        let next = next.expect("waits").id.clone();
        self.rescued.remove(&of);
        next
    }
}

/// A caller that follows `next_due_ms`. It checks each promise of the queue at each step.
struct Releaser {
    limits: Vec<(Scope, f64, u32)>,
    limiter: Limiter,
    queue: ReleaseQueue,
    buckets: Buckets,
    now_ms: i64,
    most: usize,
    events: Vec<Event>,
    waiting: BTreeSet<usize>,
    /// The bucket that delayed each deferred event longest at the last step, if there is only one such.
    held_by: HashMap<usize, Bucket>,
    /// (room, server, other server): the first server has had a turn since the other one's last turn.
    ahead: BTreeSet<(String, String, String)>,
    /// What the senders' own order goes by.
    naive: Naive,
    /// How many steps released nothing and expired nothing.
    idle: usize,
}

impl Releaser {
    fn new(limits: Vec<(Scope, f64, u32)>, most: usize) -> Self {
        Self {
            limiter: limiter(&limits),
            queue: ReleaseQueue::new(),
            buckets: Buckets::new(&limits),
            limits,
            now_ms: START_MS,
            most,
            events: Vec::new(),
            waiting: BTreeSet::new(),
            held_by: HashMap::new(),
            ahead: BTreeSet::new(),
            naive: Naive::default(),
            idle: 0,
        }
    }

    fn limited(&self, scope: Scope) -> bool {
        self.limits.iter().any(|(limited, _, _)| *limited == scope)
    }

    /// The deferred events of the same server and room.
    fn beside(&self, event: &Event) -> Vec<&Event> {
        let same = |other: &&Event| other.room == event.room && other.server == event.server;
        self.waiting
            .iter()
            .map(|id| &self.events[*id])
            .filter(same)
            .collect()
    }

    /// When all that waits of the event's server in its room is through.
    fn safe_after_ms(&self, event: &Event) -> i64 {
        let waiting = || self.waiting.iter().map(|id| &self.events[*id]);
        let of_server = waiting().filter(|other| other.server == event.server);
        let rooms: BTreeSet<&String> = of_server.map(|other| &other.room).collect();
        let in_room = waiting().filter(|other| other.room == event.room);
        let servers: BTreeSet<&String> = in_room.map(|other| &other.server).collect();
        let events = self.beside(event).len();
        let scopes = [
            (Scope::ServerInRoom, 1),
            (Scope::Server, rooms.len()),
            (Scope::Room, servers.len()),
        ];
        let through = |(scope, by): &(Scope, usize)| through_ms(&self.limits, *scope, events * by);
        self.now_ms + scopes.iter().map(through).max().unwrap_or(0)
    }

    fn arrive(&mut self, room: usize, server: usize, sender: usize, for_ms: i64, key: i64) {
        let new = event(
            self.events.len(),
            room,
            server,
            sender,
            self.now_ms + for_ms,
        )
        .of_key(key, self.now_ms + for_ms % 1_300);
        let passes = self.buckets.passes(&new, self.now_ms);
        let admitted = self.queue.admit(
            &mut self.limiter,
            &new.room,
            &new.server,
            &new.sender,
            false,
            self.now_ms,
        );
        if admitted.is_ok() {
            assert!(passes, "{new:?} exceeds a limit");
            for (id, (scope, name)) in &self.held_by {
                let overtaken = &self.events[*id];
                assert_ne!(
                    &bucket(*scope, &new),
                    name,
                    "{new:?} overtakes {overtaken:?}"
                );
            }
            let same_sender = |other: &&Event| other.sender == new.sender;
            assert!(!self.beside(&new).iter().any(same_sender), "{new:?}");
            self.buckets.charge(&new, self.now_ms);
            self.events.push(new);
            return;
        }
        if self.beside(&new).is_empty() {
            self.ahead
                .retain(|(room, _, other)| (room, other) != (&new.room, &new.server));
        }
        assert!(self.queue.add(new.deferred()));
        self.waiting.insert(self.events.len());
        self.naive.add(&new);
        self.events.push(new);
        self.settle();
    }

    /// Takes the events that are released now.
    fn settle(&mut self) {
        let mut idle = true;
        loop {
            for id in self.queue.expire(self.now_ms, 1_000) {
                idle = false;
                let event = self.gone(&id);
                self.naive.expired(&event);
            }
            let taken = self.queue.take(&mut self.limiter, self.now_ms, self.most);
            for id in &taken {
                idle = false;
                let event = self.events[id[1..].parse::<usize>().expect("ours")].clone();
                self.released(&event);
                self.gone(id);
            }
            if taken.len() < self.most {
                break;
            }
        }
        self.idle += usize::from(idle);
        self.held_by.clear();
        let mut first_ms = i64::MAX;
        for id in &self.waiting {
            let mut waits: Vec<(Bucket, i64)> = self
                .buckets
                .waits(&self.events[*id], self.now_ms)
                .into_iter()
                .map(|(of, wait_ns)| {
                    (
                        of,
                        i64::try_from((wait_ns + 999_999) / 1_000_000).expect("small"),
                    )
                })
                .collect();
            waits.sort_by_key(|(_, wait_ms)| -wait_ms);
            let longest_ms = waits.first().map_or(0, |(_, wait_ms)| *wait_ms);
            assert!(longest_ms > 0, "{:?} could be released", self.events[*id]);
            first_ms = first_ms.min(self.now_ms + longest_ms);
            // If two buckets admit it in the same millisecond, the queue may name either.
            if waits
                .get(1)
                .is_none_or(|(_, second_ms)| *second_ms < longest_ms)
            {
                self.held_by.insert(*id, waits.swap_remove(0).0);
            }
        }
        match self.queue.next_due_ms(self.now_ms) {
            None => assert!(self.waiting.is_empty()),
            Some(due_ms) => {
                assert!(due_ms > self.now_ms, "a busy loop");
                assert!(due_ms <= first_ms, "late by {}", due_ms - first_ms);
            }
        }
    }

    fn gone(&mut self, id: &str) -> Event {
        let number = id[1..].parse::<usize>().expect("ours");
        assert!(
            self.waiting.remove(&number),
            "it was deferred, and released once"
        );
        self.held_by.remove(&number);
        self.events[number].clone()
    }

    fn released(&mut self, event: &Event) {
        assert!(self.buckets.passes(event, self.now_ms), "{event:?}");
        let safe_after_ms = self.safe_after_ms(event);
        let own_ms = through_ms(&self.limits, Scope::Sender, 1);
        let deadline = |event: &Event| self.naive.deadline(event, safe_after_ms, own_ms);
        for other in self.beside(event) {
            if deadline(other) < deadline(event) {
                // The queue may skip the sender only because of its own limit.
                let waits = self.buckets.waits(other, self.now_ms);
                let own = waits.iter().find(|((scope, _), _)| *scope == Scope::Sender);
                assert!(own.is_some_and(|(_, wait_ns)| *wait_ns > 0), "{other:?}");
            }
        }
        let next = self.naive.next(event, safe_after_ms, &self.limits);
        assert_eq!(next, event.id);
        self.naive.released(event);
        self.buckets.charge(event, self.now_ms);
        if self.limits.len() == 1 && self.limited(Scope::Room) {
            self.turn(event);
        }
    }

    /// No server has two turns while another server of the room has none.
    fn turn(&mut self, event: &Event) {
        let Event { room, server, .. } = event;
        let others: BTreeSet<&String> = self
            .waiting
            .iter()
            .map(|id| &self.events[*id])
            .filter(|other| other.room == *room && other.server != *server)
            .map(|other| &other.server)
            .collect();
        for other in others {
            let turn = (room.clone(), server.clone(), other.clone());
            assert!(self.ahead.insert(turn), "{other} waits for {server}");
        }
        self.ahead
            .retain(|(in_room, _, waiter)| (in_room, waiter) != (room, server));
    }

    /// Takes events whenever they are due, up to then.
    fn run_until(&mut self, until_ms: i64) {
        while let Some(due_ms) = self.queue.next_due_ms(self.now_ms) {
            if due_ms >= until_ms {
                break;
            }
            self.now_ms = due_ms;
            self.settle();
        }
        self.now_ms = until_ms;
    }

    fn finish(mut self) {
        while let Some(due_ms) = self.queue.next_due_ms(self.now_ms) {
            self.now_ms = due_ms;
            self.settle();
        }
        assert!(self.queue.is_empty() && self.waiting.is_empty());
        // The queue tries a delayed event again when its time has come, not over and over.
        let most = 4 * self.events.len();
        assert!(self.idle <= most, "{} idle steps", self.idle);
    }
}

type Arrival = (usize, usize, usize, i64, i64, Option<i64>);

/// Each arrival is after some time, or (`None`) at the time of the next release, just before it.
fn arrivals(rooms: usize) -> impl Strategy<Value = Vec<Arrival>> {
    let after = prop_oneof![4 => Just(Some(0)), 2 => (0..700i64).prop_map(Some), 2 => Just(None)];
    let for_ms = prop_oneof![1 => 1..3_000i64, 3 => 60_000..60_010i64];
    vec(
        (0..rooms, 0..3usize, 0..4usize, for_ms, 0..4i64, after),
        1..80,
    )
}

fn release_all(arrivals: Vec<Arrival>, limits: Vec<(Scope, f64, u32)>, most: usize) {
    let mut releaser = Releaser::new(limits, most);
    for (room, server, sender, for_ms, key, after_ms) in arrivals {
        let at_ms = match after_ms {
            Some(after_ms) => releaser.now_ms + after_ms,
            None => releaser
                .queue
                .next_due_ms(releaser.now_ms)
                .unwrap_or(releaser.now_ms),
        };
        releaser.run_until(at_ms);
        releaser.arrive(room, server, sender, for_ms, key);
    }
    releaser.finish();
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(REGRESSIONS))),
        ..ProptestConfig::default()
    })]

    /// No event stays deferred without a limit of its own, no event is overtaken, and idle steps are few.
    #[test]
    fn promises(arrivals in arrivals(3), limits in some_limits(), most in 1..20usize) {
        release_all(arrivals, limits, most);
    }

    /// The same if turns alone decide: only the room has a limit.
    #[test]
    fn turns(arrivals in arrivals(2), rate in 1..20u32, burst in 1..6u32, most in 1..20usize) {
        release_all(arrivals, vec![(Scope::Room, f64::from(rate), burst)], most);
    }
}

/// If the clock is set back by an hour, an event that was due in a second is still due in a second.
#[test]
fn clock_set_back() {
    let mut limiter = limiter(&[(Scope::Sender, 1.0, 1)]);
    let mut queue = ReleaseQueue::new();
    for id in 0..3 {
        queue.add(event(id, 0, 0, 0, FAR_MS).deferred());
    }
    assert_eq!(queue.take(&mut limiter, START_MS, 10), ["$2"]);
    let back_ms = START_MS - 3_600_000;
    assert_eq!(queue.next_due_ms(back_ms), Some(back_ms + 1_000));
    assert!(queue.take(&mut limiter, back_ms + 999, 10).len() <= 1);
    assert_eq!(queue.next_due_ms(back_ms + 999), Some(back_ms + 1_999));
    assert_eq!(queue.take(&mut limiter, back_ms + 1_999, 10), ["$1"]);
    assert_eq!(queue.take(&mut limiter, back_ms + 2_999, 10), ["$0"]);
}

fn newest_first_limits() -> [(Scope, f64, u32); 1] {
    [(Scope::Sender, 2.0, 1)]
}

/// A client that flaps: however many of its older states wait, its last goes after at most two others.
#[test]
fn the_newest_of_a_key_is_next() {
    for for_ms in [60_000, 3_600_000] {
        let mut limiter = limiter(&newest_first_limits());
        let mut queue = ReleaseQueue::new();
        for id in 0..200 {
            let now_ms = START_MS + 200 * id as i64;
            queue.take(&mut limiter, now_ms, 1);
            queue.add(
                event(id, 0, 0, 0, now_ms + for_ms)
                    .of_key(1, now_ms)
                    .deferred(),
            );
        }
        let now_ms = START_MS + 40_000;
        let left = event(999, 0, 0, 0, now_ms + for_ms).of_key(1, now_ms);
        queue.add(left.deferred());
        let next = |turn: i64| queue.take(&mut limiter, now_ms + 500 * turn, 1);
        let before = (0..5).flat_map(next).position(|id| id == left.id);
        assert!(
            before.is_some_and(|before| before <= 2),
            "{before:?} before"
        );
    }
}

/// Keys take turns: one that changes all the time does not come before another that waits, and 5,000 keys of a sender
/// cost another sender of its server no turn.
#[test]
fn many_keys_cost_nobody_else() {
    let mut limiter = limiter(&[(Scope::ServerInRoom, 2.0, 1)]);
    let mut queue = ReleaseQueue::new();
    for id in 0..5_000 {
        queue.add(
            event(id, 0, 0, 0, FAR_MS)
                .of_key(id as i64, START_MS)
                .deferred(),
        );
    }
    let other = event(5_000, 0, 0, 1, FAR_MS - 1).of_key(1, START_MS);
    queue.add(other.deferred());
    assert_eq!(queue.take(&mut limiter, START_MS, 1), [other.id]);

    let mut queue = ReleaseQueue::new();
    queue.add(event(0, 0, 0, 0, FAR_MS).of_key(1, 0).deferred());
    queue.add(event(1, 0, 0, 0, FAR_MS).of_key(2, 1).deferred());
    queue.add(event(2, 0, 0, 0, FAR_MS).of_key(2, 2).deferred());
    let mut order = Vec::new();
    for id in 3..7 {
        let now_ms = START_MS + 500 * id as i64;
        order.extend(queue.take(&mut limiter, now_ms, 1));
        queue.add(event(id, 0, 0, 0, FAR_MS).of_key(2, id as i64).deferred());
    }
    assert_eq!(order, ["$2", "$0", "$4", "$5"]);
}

/// Newest first lets none expire that the share allows: of one sender, with newer ones all the time.
#[test]
fn what_would_expire_is_not_left_behind() {
    let mut limiter = limiter(&newest_first_limits());
    let mut queue = ReleaseQueue::new();
    let old: Vec<Event> = (0..100)
        .map(|id| event(id, 0, 0, 0, START_MS + 300_000))
        .collect();
    for event in &old {
        queue.add(event.deferred());
    }
    let mut released = BTreeSet::new();
    for second in 0..300 {
        let now_ms = START_MS + second * 1_000;
        for n in 0..3 {
            let id = usize::try_from(1_000 + 3 * second + n).expect("small");
            queue.add(event(id, 0, 0, 0, now_ms + 3_600_000).deferred());
        }
        for half_ms in [0, 500] {
            released.extend(queue.take(&mut limiter, now_ms + half_ms, 10));
        }
        assert_eq!(queue.expire(now_ms, 10).len(), 0);
    }
    assert!(old.iter().all(|event| released.contains(&event.id)));
}

/// L4, L7: a newer event costs no event of its sender its time, however busy the sender's server, its other rooms, and
/// the room's other servers are.
#[test]
fn what_gave_up_its_deadline_is_owed_a_turn() {
    const OWED: usize = 40;
    for (scope, rooms, servers, senders) in [
        (Scope::ServerInRoom, 1, 1, OWED),
        (Scope::Server, 5, 1, OWED),
        (Scope::Room, 1, 5, OWED),
        (Scope::ServerInRoom, 1, 1, 1),
    ] {
        let mut limiter = limiter(&[(scope, 20.0, 1), (Scope::Sender, 2.0, 1)]);
        let mut queue = ReleaseQueue::new();
        let shares = rooms * servers;
        // Ten other senders use up what their server may send, and each event of theirs lasts half an hour.
        let other = |id: usize, now_ms: i64| {
            let (room, server) = (id % rooms, id % servers);
            event(1_000 + id, room, server, 100 + id % 10, now_ms + 1_800_000)
        };
        for id in 0..20 * shares {
            queue.add(other(id, START_MS).deferred());
        }
        for id in 0..OWED {
            let sender = id % senders;
            queue.add(event(2 * id, 0, 0, sender, START_MS + 60_000).deferred());
            queue.add(event(2 * id + 1, 0, 0, sender, START_MS + 3_600_000).deferred());
        }
        let mut order = Vec::new();
        for turn in 0..1_400 {
            let now_ms = START_MS + 50 * turn as i64;
            let expired = queue.expire(now_ms, 10);
            let after_ms = 50 * turn;
            assert_eq!(expired, [""; 0], "{scope:?}, {senders}, {after_ms} ms");
            order.extend(queue.take(&mut limiter, now_ms, 1));
            queue.add(other(20 * shares + turn, now_ms).deferred());
        }
        let number = |id: &String| id[1..].parse::<usize>().expect("ours");
        let of_owed: Vec<usize> = order.iter().map(number).filter(|id| *id < 1_000).collect();
        assert_eq!(of_owed.len(), 2 * OWED, "{scope:?}");
        assert!(
            of_owed[..OWED].iter().all(|id| id % 2 == 1),
            "the newest go first"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(REGRESSIONS))),
        ..ProptestConfig::default()
    })]

    /// If half of a share suffices to deliver all in time, the one that expires first always first, then the share
    /// suffices to deliver all in time with newest first. The other half is what newest first may take.
    #[test]
    fn newest_first_takes_at_most_half(
        events in vec((0..6usize, 0..9_000i64, 0..4i64, 0..9i64), 1..60),
    ) {
        let mut limiter = limiter(&[(Scope::ServerInRoom, 10.0, 1)]);
        let mut queue = ReleaseQueue::new();
        let mut by_expiry = events;
        by_expiry.sort_unstable_by_key(|(_, for_ms, _, _)| *for_ms);
        for (id, (sender, for_ms, key, newness)) in by_expiry.iter().enumerate() {
            // Half of the share has its turn for this one after 200 ms for each that expires before.
            let expires_at_ms = START_MS + (*for_ms).max(200 * id as i64 + 1);
            queue.add(
                event(id, 0, 0, *sender, expires_at_ms)
                    .of_key(*key, START_MS + newness)
                    .deferred(),
            );
        }
        let mut now_ms = START_MS;
        while !queue.is_empty() {
            prop_assert_eq!(queue.expire(now_ms, 10), [""; 0], "after {} ms", now_ms - START_MS);
            queue.take(&mut limiter, now_ms, 1);
            now_ms += 100;
        }
    }
}

/// Half of a sender's turns are for what is current. Once only superseded events are left, all turns go to the one that
/// expires first.
#[test]
fn superseded_events_take_no_turn_from_what_would_expire() {
    let mut limiter = limiter(&newest_first_limits());
    let mut queue = ReleaseQueue::new();
    for id in 0..6 {
        let newness_ms = id as i64;
        let new = event(id, 0, 0, 0, START_MS + 2_900 + newness_ms).of_key(1, newness_ms);
        queue.add(new.deferred());
    }
    let order: Vec<String> = drain(&mut queue, &mut limiter)
        .into_iter()
        .map(|(_, id)| id)
        .collect();
    assert_eq!(order, ["$0", "$5", "$1", "$2", "$3", "$4"]);
}

/// An exempt sender is held up by its server's limit and not by its own.
#[test]
fn exempt_sender() {
    let mut limiter = limiter(&[(Scope::Sender, 1.0, 1), (Scope::Server, 1.0, 5)]);
    let mut queue = ReleaseQueue::new();
    let mut exempt = |id: usize, queue: &mut ReleaseQueue| {
        let new = event(id, 0, 0, 0, FAR_MS);
        let admitted = queue.admit(
            &mut limiter,
            &new.room,
            &new.server,
            &new.sender,
            true,
            START_MS,
        );
        queue.add(Deferred {
            is_exempt: true,
            ..new.deferred()
        });
        queue.remove(if admitted.is_ok() { &new.id } else { "" });
        admitted
    };
    for id in 0..5 {
        assert_eq!(exempt(id, &mut queue), Ok(()));
    }
    assert_eq!(exempt(5, &mut queue), Err(Scope::Server));
    assert_eq!(exempt(6, &mut queue), Err(Scope::Server));
    assert_eq!(queue.take(&mut limiter, START_MS + 2_000, 9).len(), 2);
}
