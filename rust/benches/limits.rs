//! How long a decision and a release take.

#![allow(missing_docs)] // What criterion's macros make has none.

use std::hint::black_box;

use _core::limiter::{Key, Limit, Limiter, Scope};
use _core::release::{Deferred, ReleaseQueue};
use criterion::{criterion_group, criterion_main, BatchSize, Criterion};

const START_MS: i64 = 1_800_000_000_000;

fn limiter(per_second: f64, burst_count: u32) -> Limiter {
    let limit = Limit::new(per_second, burst_count).expect("valid");
    Limiter::new(Scope::ALL.map(|scope| (scope, limit)), 65_536)
}

fn decisions(c: &mut Criterion) {
    let mut limits = limiter(0.001, 1_000_000);
    let names: Vec<(String, String)> = (0..10_000)
        .map(|n| {
            (
                format!("server{}", n % 50),
                format!("@user{n}:server{}", n % 50),
            )
        })
        .collect();
    for (server, sender) in &names {
        let _ = limits.admit(
            &Key::of_event(server, "!room", sender).map(|k| (k, 1)),
            START_MS,
        );
    }
    let mut at = 0;
    c.bench_function("admit one event, 10,000 senders known", |b| {
        b.iter(|| {
            at = (at + 1) % names.len();
            let (server, sender) = &names[at];
            limits.admit(
                &Key::of_event(server, "!room", sender).map(|k| (k, 1)),
                START_MS,
            )
        });
    });
    let mut closed = limiter(0.001, 1);
    let transaction: Vec<(Key<'_>, u32)> = names[..50]
        .iter()
        .flat_map(|(_, sender)| {
            let (server, room) = ("server0", "!room");
            [
                Key::Server(server),
                Key::ServerInRoom(server, room),
                Key::Sender(sender, room),
            ]
        })
        .map(|key| (key, 1))
        .collect();
    let _ = closed.admit(&transaction, START_MS);
    c.bench_function("refuse a transaction of 50", |b| {
        b.iter(|| closed.admit(black_box(&transaction), START_MS));
    });
}

fn releases(c: &mut Criterion) {
    let events: Vec<[String; 4]> = (0..5_000)
        .map(|n| {
            let server = format!("server{}", n % 50);
            [
                format!("${n}"),
                format!("!{}", n % 3),
                format!("@{}:{server}", n % 700),
                server,
            ]
        })
        .collect();
    let full = || {
        let mut queue = ReleaseQueue::new();
        for [event_id, room_id, sender, server] in &events {
            queue.add(Deferred {
                event_id,
                room_id,
                server,
                sender,
                expires_at_ms: START_MS + 3_600_000,
            });
        }
        (queue, limiter(100.0, 1_000))
    };
    c.bench_function("release 100 of 5,000 of 50 servers", |b| {
        b.iter_batched(
            full,
            |(mut queue, mut limits)| queue.take(&mut limits, START_MS, 100),
            BatchSize::LargeInput,
        );
    });
}

criterion_group!(benches, decisions, releases);
criterion_main!(benches);
