//! How long a decision and a release take. `cargo bench`.

#![allow(missing_docs)] // Criterion's macros generate items without docs.

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
    // Time passes at each event. Else the room's bucket is empty after a million, and this measures refusals.
    let mut limits = limiter(1e6, 1_000_000);
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
    let mut now_ms = START_MS;
    c.bench_function("admit one event, 10,000 senders known", |b| {
        b.iter(|| {
            at = (at + 1) % names.len();
            now_ms += 1;
            let (server, sender) = &names[at];
            let admitted = limits.admit(
                &Key::of_event(server, "!room", sender).map(|k| (k, 1)),
                now_ms,
            );
            assert_eq!(admitted, Ok(()));
        });
    });
    // More buckets than any transaction of 50 has: the events share only the server's.
    let mut open = limiter(1e6, 1_000_000);
    let rooms: Vec<String> = (0..50).map(|n| format!("!{n}")).collect();
    let most: Vec<(Key<'_>, u32)> = names[..50]
        .iter()
        .zip(&rooms)
        .flat_map(|((_, sender), room)| {
            [
                (Key::ServerInRoom("server0", room), 1),
                (Key::Sender(sender, room), 1),
                (Key::Room(room), 1),
            ]
        })
        .chain([(Key::Server("server0"), 50)])
        .collect();
    c.bench_function("admit 151 charges", |b| {
        b.iter(|| {
            now_ms += 1;
            assert_eq!(open.admit(black_box(&most), now_ms), Ok(()));
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
                key: Some(0),
                newness_ms: START_MS,
                is_exempt: false,
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
