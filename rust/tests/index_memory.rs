//! The memory that a row costs, and that no single insertion moves much: the index grows without pauses.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use _core::index::{NewRow, StickyIndex};

const ROWS: usize = 200_000;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator. It counts the memory in use.
struct Counting;

// SAFETY: every call passes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Relaxed);
        LARGEST.fetch_max(layout.size(), Relaxed);
        System.alloc(layout)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        System.dealloc(memory, layout);
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The cost per row beyond the event ID, in bytes. One row in `own_every` is this server's own. `users` on `servers`
/// send the others.
fn cost_per_row(own_every: usize, users: usize, servers: usize) -> usize {
    let event_id = |row: usize| format!("${row:0>43}");
    let before = IN_USE.load(Relaxed);
    LARGEST.store(0, Relaxed);
    let mut index = StickyIndex::new("own.example");
    for row in 0..ROWS {
        let user = row % users;
        let server = match row % own_every {
            0 => "own.example".to_owned(),
            _ => format!("server{}.example", user % servers),
        };
        let stream_id = i64::try_from(row).expect("it is small");
        let new = NewRow {
            stream_id,
            instance_name: "event_persister1",
            room_id: &format!("!room{}:example.org", row % 1_000),
            event_id: &event_id(row),
            sender: &format!("@user{user}:{server}"),
            expires_at_ms: stream_id % 3_600_000,
            key: Some(stream_id),
            newness_ms: stream_id % 3_600_000,
            size_bytes: 1_000,
        };
        index.insert(new).expect("the index is not full");
    }
    let cost = (IN_USE.load(Relaxed) - before) / ROWS - event_id(0).len();
    assert!(LARGEST.load(Relaxed) <= 64 * 1024, "{LARGEST:?}");
    while index.expire(i64::MAX, 10_000) > 0 {}
    let left = IN_USE.load(Relaxed) - before;
    // An empty tree keeps its last node.
    assert!(left < 4_096, "{left} bytes left of an empty index");
    cost
}

// A single test, since the allocator would count the memory of another one too.
#[test]
fn a_row_costs_less_than_200_bytes() {
    for own_every in [10, 1] {
        let cost = cost_per_row(own_every, 5_003, 101);
        println!("one in {own_every} own: {cost} bytes a row");
        assert!(cost <= 200, "{cost}");
    }
    // The worst case of made-up names (L6), with the names themselves.
    let cost = cost_per_row(ROWS, ROWS, ROWS);
    println!("every row from a server of its own: {cost} bytes a row");
    assert!(cost <= 400, "{cost}");
}
