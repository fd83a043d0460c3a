//! The index with 100,000 rows in 1,000 rooms. `cargo bench`.

#![allow(missing_docs)] // Criterion's macros generate items without docs.

use std::collections::HashSet;
use std::hint::black_box;

use _core::index::{Most, NewRow, Position, Range, StickyIndex};
use criterion::{criterion_group, criterion_main, BatchSize, Criterion};

const ROWS: i64 = 100_000;
const ROOMS: i64 = 1_000;

struct Row {
    stream_id: i64,
    room: String,
    event: String,
    sender: String,
}

impl Row {
    fn new(stream_id: i64) -> Self {
        // One event in ten is this server's own.
        let server = match stream_id % 10 {
            0 => "own.example".to_owned(),
            _ => format!("server{}.example", stream_id % 97),
        };
        Self {
            stream_id,
            room: room_id(stream_id * 7919 % ROOMS),
            event: format!("${stream_id:0>43}"),
            sender: format!("@user{}:{server}", stream_id % 1009),
        }
    }

    fn as_new(&self) -> NewRow<'_> {
        NewRow {
            stream_id: self.stream_id,
            instance_name: "event_persister1",
            room_id: &self.room,
            event_id: &self.event,
            sender: &self.sender,
            expires_at_ms: self.stream_id,
            key: Some(self.stream_id % 50),
            newness_ms: self.stream_id,
            size_bytes: 1_000,
        }
    }
}

fn room_id(room: i64) -> String {
    format!("!abcdefghijklm{room:0>5}:example.org")
}

fn full_index(rows: &[Row]) -> StickyIndex {
    let mut index = StickyIndex::new("own.example");
    for row in rows {
        index.insert(row.as_new()).expect("the index is not full");
    }
    index
}

/// So many rows of a room, all of them newest of their keys.
fn keys_in_a_room(rows: i64, senders: i64) -> StickyIndex {
    let mut index = StickyIndex::new("own.example");
    for stream_id in 1..=rows {
        let shuffled = stream_id * 7919 % rows;
        let sender = format!(
            "@user{}:server{}.example",
            shuffled % senders,
            shuffled % senders % 97
        );
        let new = NewRow {
            stream_id,
            instance_name: "event_persister1",
            room_id: "!room:example.org",
            event_id: &format!("${shuffled:0>43}"),
            sender: &sender,
            expires_at_ms: rows,
            key: Some(stream_id),
            newness_ms: rows + shuffled,
            size_bytes: 1_000,
        };
        index.insert(new).expect("the index is not full");
    }
    index
}

fn range(after: i64, up_to: i64) -> Range {
    let at = |stream_id| Position {
        stream_id,
        ..Position::default()
    };
    Range {
        after: at(after),
        up_to: at(up_to),
    }
}

fn changes(c: &mut Criterion) {
    let rows: Vec<Row> = (1..=ROWS).map(Row::new).collect();
    let mut group = c.benchmark_group("100k rows");
    group.sample_size(10);
    group.bench_function("insert all", |b| b.iter(|| full_index(&rows)));
    group.bench_function("expire 1,000", |b| {
        b.iter_batched_ref(
            || full_index(&rows),
            |index| assert_eq!(index.expire(ROWS, 1_000), 1_000),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

fn queries(c: &mut Criterion) {
    let rows: Vec<Row> = (1..=ROWS).map(Row::new).collect();
    let mut index = full_index(&rows);
    let names: Vec<String> = (0..ROOMS).map(room_id).collect();
    let few: HashSet<&str> = names[..5].iter().map(String::as_str).collect();
    let many: HashSet<&str> = names.iter().map(String::as_str).collect();

    let mut group = c.benchmark_group("events_in_rooms");
    for (rooms, set) in [("5 rooms", &few), ("1,000 rooms", &many)] {
        for (size, after) in [("nothing new", ROWS), ("10 new", ROWS - 10), ("all new", 0)] {
            group.bench_function(format!("{rooms}, {size}"), |b| {
                let range = range(after, ROWS);
                b.iter(|| {
                    let Ok(found) = index.events_in_rooms(black_box(set), &range, 0, Some(100));
                    found.len()
                });
            });
        }
    }
    group.finish();

    let mut group = c.benchmark_group("present_by_room");
    let most = Most {
        events: 1_000,
        bytes: 4_000_000,
        keys: 20,
        oldest: 50,
    };
    for (rooms, set) in [("5 rooms", &few), ("1,000 rooms", &many)] {
        group.bench_function(rooms, |b| {
            let range = range(0, ROWS);
            b.iter(|| {
                let Ok(present) = index.present_by_room(black_box(set), &range, 0, &most);
                present.found.count
            });
        });
    }
    for (name, senders) in [("one sender", 1), ("a sender each", 20_000)] {
        let index = keys_in_a_room(20_000, senders);
        let room: HashSet<&str> = HashSet::from(["!room:example.org"]);
        group.bench_function(format!("20,000 keys in a room, {name}"), |b| {
            let range = range(0, 20_000);
            b.iter(|| {
                let Ok(present) = index.present_by_room(black_box(&room), &range, 0, &most);
                present.found.count
            });
        });
    }
    group.finish();

    c.bench_function("own_events, 100", |b| {
        b.iter(|| index.own_events(black_box(&names[0]), 0, 0, 100).count());
    });
    c.bench_function("server_count", |b| {
        b.iter(|| index.server_count(black_box(&names[0]), 0));
    });
}

criterion_group!(benches, changes, queries);
criterion_main!(benches);
