//! The index against a simple model, a list of rows: random actions on both, and a comparison of every query.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use _core::index::{NewRow, Position, Range, StickyIndex};
use proptest::collection::{hash_map, hash_set, vec};
use proptest::prelude::*;

const OWN: &str = "own:8448";
const SENDERS: [&str; 6] = [
    "@a:own:8448",
    "@b:own:8448",
    "@a:far",
    "@b:far",
    "@a:8448",
    "nobody",
];
const WRITERS: [&str; 3] = ["main", "persister1", "persister2"];
/// Few of each, so that they often coincide.
const ROOMS: u8 = 4;
const EVENTS: u8 = 48;
const LAST: i64 = 40;

#[derive(Clone, Debug, PartialEq)]
struct Row {
    stream_id: i64,
    writer: &'static str,
    room: String,
    event: String,
    sender: &'static str,
    expires: i64,
}

/// The naive model.
#[derive(Default)]
struct Model {
    rows: Vec<Row>,
    positions: BTreeMap<String, i64>,
}

impl Model {
    fn insert(&mut self, new: Row) {
        match self.rows.iter_mut().find(|row| row.event == new.event) {
            Some(row) if row.stream_id < new.stream_id => *row = new,
            Some(_) => {}
            None => self.rows.push(new),
        }
    }

    fn remove_if(&mut self, gone: impl Fn(&Row) -> bool) -> usize {
        let before = self.rows.len();
        self.rows.retain(|row| !gone(row));
        before - self.rows.len()
    }

    /// The rows that match, by stream ID.
    fn find(&self, matches: impl Fn(&Row) -> bool) -> Vec<&Row> {
        let mut found: Vec<&Row> = self.rows.iter().filter(|row| matches(row)).collect();
        found.sort_by_key(|row| row.stream_id);
        found
    }
}

#[derive(Clone, Debug)]
enum Action {
    Insert(Row),
    Remove(String),
    Expire(i64, usize),
    Advance(&'static str, i64),
    Query(Query),
}

#[derive(Clone, Debug)]
struct Query {
    rooms: HashSet<String>,
    range: Range,
    now: i64,
    limit: Option<usize>,
}

fn room() -> impl Strategy<Value = String> {
    (0..ROOMS).prop_map(|room| format!("!{room}"))
}

fn event() -> impl Strategy<Value = String> {
    (0..EVENTS).prop_map(|event| format!("${event}"))
}

fn time() -> impl Strategy<Value = i64> {
    prop_oneof![20 => 0..12_i64, 1 => Just(i64::MIN), 1 => Just(i64::MAX)]
}

/// Often equal to another row's: two rows may share a stream ID.
fn stream_id() -> impl Strategy<Value = i64> {
    prop_oneof![40 => 0..LAST, 1 => Just(i64::MIN), 1 => Just(i64::MAX), 1 => Just(-1)]
}

fn writer() -> impl Strategy<Value = &'static str> {
    prop::sample::select(&WRITERS[..])
}

fn position() -> impl Strategy<Value = Position> {
    let writers = hash_map(writer().prop_map(str::to_owned), stream_id(), 0..3);
    (stream_id(), writers).prop_map(|(stream_id, writers)| Position { stream_id, writers })
}

fn row() -> impl Strategy<Value = Row> {
    let sender = prop::sample::select(&SENDERS[..]);
    (stream_id(), writer(), room(), event(), sender, time()).prop_map(
        |(stream_id, writer, room, event, sender, expires)| Row {
            stream_id,
            writer,
            room,
            event,
            sender,
            expires,
        },
    )
}

fn query() -> impl Strategy<Value = Query> {
    // Unknown rooms make the number of rooms large, and so make the other way to search the cheaper one.
    let unknown = (0..40_u8).prop_map(|room| format!("!unknown{room}"));
    let unknown = prop_oneof![Just(HashSet::new()), hash_set(unknown, 0..12)];
    let rooms = (hash_set(room(), 0..4), unknown)
        .prop_map(|(known, unknown)| known.into_iter().chain(unknown).collect());
    let limit = prop_oneof![Just(None), (0..6_usize).prop_map(Some)];
    (rooms, position(), position(), time(), limit).prop_map(|(rooms, after, up_to, now, limit)| {
        Query {
            rooms,
            range: Range { after, up_to },
            now,
            limit,
        }
    })
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        20 => row().prop_map(Action::Insert),
        2 => event().prop_map(Action::Remove),
        2 => (time(), 0..6_usize).prop_map(|(now, max)| Action::Expire(now, max)),
        2 => (writer(), stream_id()).prop_map(|(writer, id)| Action::Advance(writer, id)),
        10 => query().prop_map(Action::Query),
    ]
}

/// Both answers are in the order of stream IDs. Rows with the same stream ID may be in either order.
fn assert_same_rows(found: &[(i64, &str)], expected: &[&Row], limit: usize) {
    let ids = |rows: &[&Row]| -> Vec<i64> { rows.iter().map(|row| row.stream_id).collect() };
    let found_ids: Vec<i64> = found.iter().map(|(stream_id, _)| *stream_id).collect();
    let cut = &expected[..limit.min(expected.len())];
    assert_eq!(found_ids, ids(cut));
    let distinct: HashSet<_> = found.iter().collect();
    assert_eq!(distinct.len(), found.len(), "a row was found twice");
    let all: HashSet<_> = expected
        .iter()
        .map(|row| (row.stream_id, row.event.as_str()))
        .collect();
    assert!(found.iter().all(|row| all.contains(row)));
}

/// The position of one writer, by the definition of Synapse's tokens.
fn at(position: &Position, writer: &str) -> i64 {
    let own = position.writers.get(writer).copied();
    own.unwrap_or(position.stream_id).max(position.stream_id)
}

fn check(index: &mut StickyIndex, model: &Model, query: &Query) {
    let Query {
        rooms,
        range,
        now,
        limit,
    } = query;
    let asked: HashSet<&str> = rooms.iter().map(String::as_str).collect();
    let Ok(found) = index.events_in_rooms(&asked, range, *now, *limit);
    for row in &found {
        assert_eq!(index.get(row.event_id), Some(*row));
    }
    let Ok(by_room) = index.events_by_room(&asked, range, *now, *limit);
    assert_eq!(by_room.count, found.len());
    assert_eq!(
        by_room.last_stream_id,
        found.last().map(|row| row.stream_id)
    );
    let mut first_id = i64::MIN;
    for (room, events) in &by_room.rooms {
        let in_room: Vec<_> = found.iter().filter(|row| row.room_id == *room).collect();
        assert!(in_room
            .iter()
            .map(|row| row.event_id)
            .eq(events.iter().copied()));
        assert!(first_id <= in_room[0].stream_id);
        first_id = in_room[0].stream_id;
    }
    let sum: usize = by_room.rooms.iter().map(|(_, events)| events.len()).sum();
    assert_eq!(sum, by_room.count);
    let found: Vec<_> = found
        .iter()
        .map(|row| (row.stream_id, row.event_id))
        .collect();
    let expected = model.find(|row| {
        let (after, up_to) = (at(&range.after, row.writer), at(&range.up_to, row.writer));
        let in_range = after < row.stream_id && row.stream_id <= up_to;
        in_range && rooms.contains(&row.room) && row.expires > *now
    });
    assert_same_rows(&found, &expected, limit.unwrap_or(usize::MAX));

    for room in rooms {
        let from = range.after.stream_id;
        let limit = limit.unwrap_or(usize::MAX);
        let found: Vec<_> = index
            .own_events(room, from, *now, limit)
            .map(|row| (row.stream_id, row.event_id))
            .collect();
        let expected = model.find(|row| {
            let own = row.sender.ends_with(":own:8448");
            own && row.room == *room && row.stream_id >= from && row.expires > *now
        });
        assert_same_rows(&found, &expected, limit);

        let servers: BTreeSet<&str> = model
            .find(|row| row.room == *room && row.expires > *now)
            .iter()
            .filter_map(|row| Some(row.sender.split_once(':')?.1))
            .collect();
        assert_eq!(index.server_count(room, *now), servers.len());
    }

    let wanted: HashMap<String, i64> = range.up_to.writers.clone();
    let in_step = wanted
        .iter()
        .all(|(writer, at)| model.positions.get(writer).copied().unwrap_or(0) >= *at);
    assert_eq!(
        index.in_step(wanted.iter().map(|(name, at)| (name.as_str(), *at))),
        in_step
    );
}

fn check_rows(index: &StickyIndex, model: &Model) {
    assert_eq!(index.len(), model.rows.len());
    assert_eq!(index.positions(), &model.positions);
    for row in &model.rows {
        let found = index.get(&row.event).expect("no row is lost");
        assert!(index.contains(&row.event));
        assert_eq!(found.stream_id, row.stream_id);
        assert_eq!(found.room_id, row.room);
        assert_eq!(found.sender, row.sender);
        assert_eq!(found.expires_at_ms, row.expires);
    }
}

fn act(index: &mut StickyIndex, model: &mut Model, action: Action) {
    match action {
        Action::Insert(row) => {
            let new = NewRow {
                stream_id: row.stream_id,
                instance_name: row.writer,
                room_id: &row.room,
                event_id: &row.event,
                sender: row.sender,
                expires_at_ms: row.expires,
            };
            index.insert(new).expect("the index is not full");
            model.insert(row);
        }
        Action::Remove(event) => {
            let removed = model.remove_if(|row| row.event == event);
            assert_eq!(index.remove(&event), removed == 1);
        }
        Action::Expire(now, max) => {
            let mut expired: Vec<_> = model.rows.iter().filter(|row| row.expires <= now).collect();
            expired.sort_by_key(|row| row.expires);
            expired.truncate(max);
            let times: Vec<_> = expired.iter().map(|row| row.expires).collect();
            assert_eq!(index.expire(now, max), times.len());
            // The index may drop rows that expire at the same time in either order. So the model drops the same rows,
            // but counts them itself.
            let mut gone: Vec<_> = model
                .rows
                .iter()
                .filter(|row| !index.contains(&row.event))
                .map(|row| row.expires)
                .collect();
            gone.sort_unstable();
            assert_eq!(gone, times);
            model.rows.retain(|row| index.contains(&row.event));
        }
        Action::Advance(writer, id) => {
            index.advance(writer, id);
            let position = model.positions.entry(writer.to_owned()).or_insert(id);
            *position = id.max(*position);
        }
        Action::Query(query) => check(index, model, &query),
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        // The file is in the repository, so that every run first tries what once failed.
        failure_persistence: Some(Box::new(
            prop::test_runner::FileFailurePersistence::Direct("rust/tests/proptest-regressions/index_model.txt"),
        )),
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_index_does_as_the_model(actions in vec(action(), 1..120)) {
        let mut index = StickyIndex::new(OWN);
        let mut model = Model::default();
        for action in actions {
            act(&mut index, &mut model, action);
            check_rows(&index, &model);
        }
    }
}
