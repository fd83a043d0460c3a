//! The index against a simple model, a list of rows: random actions on both, and a comparison of every query.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use _core::index::{Most, NewRow, Position, Range, StickyIndex};
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
    key: Option<i64>,
    newness: i64,
    size: u32,
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
    most: Most,
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
    let ahead = prop_oneof![4 => Just(0), 1 => 0..12_i64];
    let content = (prop::option::of(1..4_i64), ahead, 0..40_u32);
    (
        stream_id(),
        writer(),
        room(),
        event(),
        sender,
        time(),
        content,
    )
        .prop_map(
            |(stream_id, writer, room, event, sender, expires, (key, ahead, size))| Row {
                stream_id,
                writer,
                room,
                event,
                sender,
                expires,
                key,
                newness: expires.saturating_add(ahead),
                size,
            },
        )
}

fn most() -> impl Strategy<Value = Most> {
    (0..12_usize, 0..300_usize, 0..4_usize, 0..4_usize).prop_map(|(events, bytes, keys, oldest)| {
        Most {
            events,
            bytes,
            keys,
            oldest,
        }
    })
}

fn query() -> impl Strategy<Value = Query> {
    // Unknown rooms make the number of rooms large, and so make the other way to search the cheaper one.
    let unknown = (0..40_u8).prop_map(|room| format!("!unknown{room}"));
    let unknown = prop_oneof![Just(HashSet::new()), hash_set(unknown, 0..12)];
    let rooms = (hash_set(room(), 0..4), unknown)
        .prop_map(|(known, unknown)| known.into_iter().chain(unknown).collect());
    let limit = prop_oneof![Just(None), (0..6_usize).prop_map(Some)];
    (rooms, position(), position(), time(), limit, most()).prop_map(
        |(rooms, after, up_to, now, limit, most)| Query {
            rooms,
            range: Range { after, up_to },
            now,
            limit,
            most,
        },
    )
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

/// What a first response has of these rows, step by step: turn after turn, each time by a look at all that is left.
fn present_of<'a>(rows: &[&'a Row], most: &Most) -> (Vec<&'a Row>, Option<i64>) {
    let size = |rows: &[&Row]| rows.iter().map(|row| row.size as usize).sum::<usize>();
    if rows.len() <= most.events && size(rows) <= most.bytes {
        return (rows.to_vec(), None);
    }
    let newness = |row: &Row| (row.newness, row.event.clone());
    let same_sender = |a: &Row, b: &Row| a.room == b.room && a.sender == b.sender;
    let is_newest = |row: &Row| {
        row.key.is_none()
            || !rows.iter().any(|other| {
                same_sender(row, other) && row.key == other.key && newness(row) < newness(other)
            })
    };
    let keys: Vec<&Row> = rows.iter().copied().filter(|row| is_newest(row)).collect();
    let before = |row: &Row| {
        let newer = |other: &&&Row| same_sender(row, other) && newness(row) < newness(other);
        keys.iter().filter(newer).count()
    };
    let server = |row: &Row| {
        row.sender
            .split_once(':')
            .map_or("", |(_, server)| server)
            .to_owned()
    };
    let waiting: Vec<&Row> = keys
        .iter()
        .copied()
        .filter(|row| before(row) < most.keys)
        .collect();
    // Each list has the place of a row among those of its group: first by the list before, then the newest first.
    let place = |ranks: &[usize], same: &dyn Fn(&Row, &Row) -> bool| -> Vec<usize> {
        let order = |at: usize| (ranks[at], -i128::from(waiting[at].stream_id));
        let all = 0..waiting.len();
        all.clone()
            .map(|at| {
                all.clone()
                    .filter(|other| same(waiting[at], waiting[*other]) && order(*other) < order(at))
                    .count()
            })
            .collect()
    };
    let of_sender: Vec<usize> = waiting.iter().map(|row| before(row)).collect();
    let of_server = place(&of_sender, &|a, b| {
        a.room == b.room && server(a) == server(b)
    });
    let of_room = place(&of_server, &|a, b| a.room == b.room);
    let of_all = place(&of_room, &|_, _| true);

    let oldest = most.oldest.min(most.events);
    let most_bytes = most.bytes.max(size(&rows[..1]));
    let mut chosen: Vec<&Row> = rows.first().copied().into_iter().collect();
    let mut left = most.events - oldest;
    for turn in 0..waiting.len() {
        let at = of_all
            .iter()
            .position(|place| *place == turn)
            .expect("each has its place");
        let row = waiting[at];
        if left > 0 && !chosen.contains(&row) && size(&chosen) + row.size as usize <= most_bytes {
            chosen.push(row);
            left -= 1;
        }
    }
    let mut left = oldest.saturating_sub(1);
    let mut whole_up_to = None;
    for row in rows {
        if !chosen.contains(row) {
            if left == 0 || size(&chosen) + row.size as usize > most_bytes {
                break;
            }
            left -= 1;
            chosen.push(row);
        }
        whole_up_to = Some(row.stream_id);
    }
    (chosen, whole_up_to)
}

fn check(index: &mut StickyIndex, model: &Model, query: &Query) {
    let Query {
        rooms,
        range,
        now,
        limit,
        most,
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
    // With stream IDs that are unique, as they are in Synapse, there is one answer.
    if expected
        .windows(2)
        .all(|two| two[0].stream_id < two[1].stream_id)
    {
        let Ok(present) = index.present_by_room(&asked, range, *now, most);
        let (chosen, whole_up_to) = present_of(&expected, most);
        assert_eq!(present.whole_up_to, whole_up_to);
        assert_eq!(present.found.count, chosen.len());
        let found: HashSet<&str> = present
            .found
            .rooms
            .iter()
            .flat_map(|room| &room.1)
            .copied()
            .collect();
        let chosen: HashSet<&str> = chosen.iter().map(|row| row.event.as_str()).collect();
        assert_eq!(found, chosen);
    }

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
                key: row.key,
                newness_ms: row.newness,
                size_bytes: row.size,
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
