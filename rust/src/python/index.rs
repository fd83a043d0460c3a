//! `StickyIndex`.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyFrozenSet, PyList, PySet, PyString};

use super::arguments::{
    text, EventId, ExpiresAtMs, FromPositions, FromStreamId, InstanceName, MaxBytes, MaxEvents,
    MaxFound, MaxKeys, MaxOldest, MaxRows, NewnessMs, NowMs, Positions, RoomId, Row, Sender,
    ServerName, SizeBytes, StickyKey, StreamId, ToPositions, ToStreamId,
};
use super::guarded::{Guarded, OnPanic};
use crate::error::Error;
use crate::index::{Most, NewRow, Position, Range, RoomEvents, Rooms, StickyIndex};

/// `(stream_id, room_id, event_id, sender, expires_at_ms)`
type FoundTuple<'a> = (i64, &'a str, &'a str, &'a str, i64);

#[pyclass(name = "StickyIndex", module = "synapse_sticky._core")]
pub(super) struct PyStickyIndex(Guarded<StickyIndex>);

#[pymethods]
impl PyStickyIndex {
    #[new]
    #[pyo3(signature = (server_name, *, on_panic=None))]
    fn new(server_name: ServerName, on_panic: OnPanic) -> Result<Self, Error> {
        if server_name.0.is_empty() {
            return Err(Error::bad_value(
                "server_name",
                "the name of a server, not empty",
            ));
        }
        let make = || StickyIndex::new(&server_name.0);
        Guarded::new("StickyIndex", on_panic, make).map(Self)
    }

    fn insert(&mut self, rows: OwnedRows) -> Result<(), Error> {
        self.0.write(|index| {
            for row in &rows.0 {
                index.insert(row.as_new())?;
            }
            Ok(())
        })?
    }

    fn remove(&mut self, event_id: EventId) -> Result<bool, Error> {
        self.0.write(|index| index.remove(&event_id.0))
    }

    fn expire(&mut self, now_ms: NowMs, max_rows: MaxRows) -> Result<usize, Error> {
        self.0.write(|index| index.expire(now_ms.0, max_rows.0))
    }

    fn advance(&mut self, instance_name: InstanceName, stream_id: StreamId) -> Result<(), Error> {
        self.0
            .write(|index| index.advance(&instance_name.0, stream_id.0))
    }

    fn positions(&self) -> Result<BTreeMap<String, i64>, Error> {
        self.0.read(|index| index.positions().clone())
    }

    fn in_step(&self, positions: Positions) -> Result<bool, Error> {
        let positions = positions.0.iter().map(|(name, at)| (name.as_str(), *at));
        self.0.read(|index| index.in_step(positions))
    }

    #[allow(clippy::too_many_arguments)] // Two positions are two arguments each, as in Synapse's tokens.
    fn events_in_rooms<'py>(
        &self,
        py: Python<'py>,
        room_ids: PyRooms<'_, 'py>,
        from_stream_id: FromStreamId,
        from_positions: FromPositions,
        to_stream_id: ToStreamId,
        to_positions: ToPositions,
        now_ms: NowMs,
        limit: Option<MaxFound>,
    ) -> PyResult<Bound<'py, PyList>> {
        let range = range(from_stream_id, from_positions, to_stream_id, to_positions);
        let limit = limit.map(|limit| limit.0);
        let found = self
            .0
            .read(|index| index.events_in_rooms(&room_ids, &range, now_ms.0, limit))??;
        let tuples = found
            .iter()
            .map(|row| (row.stream_id, row.room_id, row.event_id));
        PyList::new(py, tuples)
    }

    #[allow(clippy::too_many_arguments)] // As above.
    fn events_by_room<'py>(
        &self,
        py: Python<'py>,
        room_ids: PyRooms<'_, 'py>,
        from_stream_id: FromStreamId,
        from_positions: FromPositions,
        to_stream_id: ToStreamId,
        to_positions: ToPositions,
        now_ms: NowMs,
        limit: Option<MaxFound>,
    ) -> PyResult<(Bound<'py, PyDict>, usize, Option<i64>)> {
        let range = range(from_stream_id, from_positions, to_stream_id, to_positions);
        let limit = limit.map(|limit| limit.0);
        let found = self
            .0
            .read(|index| index.events_by_room(&room_ids, &range, now_ms.0, limit))??;
        Ok((by_room(py, &found)?, found.count, found.last_stream_id))
    }

    #[allow(clippy::too_many_arguments)] // As above.
    fn present_by_room<'py>(
        &self,
        py: Python<'py>,
        room_ids: PyRooms<'_, 'py>,
        to_stream_id: ToStreamId,
        to_positions: ToPositions,
        now_ms: NowMs,
        max_events: MaxEvents,
        max_bytes: MaxBytes,
        max_keys: MaxKeys,
        max_oldest: MaxOldest,
    ) -> PyResult<(Bound<'py, PyDict>, Option<i64>)> {
        let from = (FromStreamId(0), FromPositions(HashMap::new()));
        let range = range(from.0, from.1, to_stream_id, to_positions);
        let most = Most {
            events: max_events.0,
            bytes: max_bytes.0,
            keys: max_keys.0,
            oldest: max_oldest.0,
        };
        let present = self
            .0
            .read(|index| index.present_by_room(&room_ids, &range, now_ms.0, &most))??;
        Ok((by_room(py, &present.found)?, present.whole_up_to))
    }

    fn own_events(
        &self,
        room_id: RoomId,
        from_stream_id: FromStreamId,
        now_ms: NowMs,
        limit: MaxFound,
    ) -> Result<Vec<(i64, &str, &str)>, Error> {
        self.0.read(|index| {
            index
                .own_events(&room_id.0, from_stream_id.0, now_ms.0, limit.0)
                .map(|found| (found.stream_id, found.event_id, found.sender))
                .collect()
        })
    }

    fn server_count(&mut self, room_id: RoomId, now_ms: NowMs) -> Result<usize, Error> {
        self.0
            .write(|index| index.server_count(&room_id.0, now_ms.0))
    }

    fn get(&self, event_id: EventId) -> Result<Option<FoundTuple<'_>>, Error> {
        let found = self.0.read(|index| index.get(&event_id.0))?;
        Ok(found.map(|found| {
            (
                found.stream_id,
                found.room_id,
                found.event_id,
                found.sender,
                found.expires_at_ms,
            )
        }))
    }

    fn __len__(&self) -> Result<usize, Error> {
        self.0.read(StickyIndex::len)
    }

    fn __contains__(&self, event_id: EventId) -> Result<bool, Error> {
        self.0.read(|index| index.contains(&event_id.0))
    }
}

fn by_room<'py>(py: Python<'py>, found: &RoomEvents<'_>) -> PyResult<Bound<'py, PyDict>> {
    let by_room = PyDict::new(py);
    for (room_id, event_ids) in &found.rooms {
        by_room.set_item(room_id, PyList::new(py, event_ids)?)?;
    }
    Ok(by_room)
}

fn range(
    from_stream_id: FromStreamId,
    from_positions: FromPositions,
    to_stream_id: ToStreamId,
    to_positions: ToPositions,
) -> Range {
    Range {
        after: Position {
            stream_id: from_stream_id.0,
            writers: from_positions.0,
        },
        up_to: Position {
            stream_id: to_stream_id.0,
            writers: to_positions.0,
        },
    }
}

/// How many fields each row has.
const FIELDS: usize = 6;

/// A row of `StickyIndex.insert`. Python owns the strings.
struct OwnedRow {
    stream_id: StreamId,
    instance_name: InstanceName,
    room_id: RoomId,
    event_id: EventId,
    sender: Sender,
    expires_at_ms: ExpiresAtMs,
    content: Option<OwnedContent>,
}

/// What the first response of somebody who arrives late is chosen by.
struct OwnedContent {
    key: Option<StickyKey>,
    newness_ms: NewnessMs,
    size_bytes: SizeBytes,
}

impl OwnedRow {
    fn read(row: &Row<'_>) -> PyResult<Self> {
        Ok(Self {
            stream_id: row.field(0)?,
            instance_name: row.field(1)?,
            room_id: row.field(2)?,
            event_id: row.field(3)?,
            sender: row.field(4)?,
            expires_at_ms: row.field(5)?,
            content: (row.len() > FIELDS)
                .then(|| OwnedContent::read(row))
                .transpose()?,
        })
    }

    fn as_new(&self) -> NewRow<'_> {
        let content = self.content.as_ref();
        NewRow {
            stream_id: self.stream_id.0,
            instance_name: &self.instance_name.0,
            room_id: &self.room_id.0,
            event_id: &self.event_id.0,
            sender: &self.sender.0,
            expires_at_ms: self.expires_at_ms.0,
            key: content.and_then(|content| Some(content.key.as_ref()?.0)),
            newness_ms: content.map_or(self.expires_at_ms.0, |content| content.newness_ms.0),
            size_bytes: content.map_or(0, |content| {
                u32::try_from(content.size_bytes.0).unwrap_or(u32::MAX)
            }),
        }
    }
}

impl OwnedContent {
    fn read(row: &Row<'_>) -> PyResult<Self> {
        Ok(Self {
            key: row.optional_field(FIELDS)?,
            newness_ms: row.field(FIELDS + 1)?,
            size_bytes: row.field(FIELDS + 2)?,
        })
    }
}

/// All rows of a call. PyO3 extracts all of them before the index inserts one, so a bad row leaves the index unchanged.
struct OwnedRows(Vec<OwnedRow>);

impl FromPyObject<'_, '_> for OwnedRows {
    type Error = PyErr;

    fn extract(rows: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        const EXPECTED: &str = "a tuple (stream_id, instance_name, room_id, event_id, sender, \
                                expires_at_ms), which key, newness_ms and size_bytes may follow";
        let lens = [FIELDS, FIELDS + 3];
        Row::read_all(&rows, "rows", &lens, EXPECTED, OwnedRow::read).map(Self)
    }
}

/// A Python collection of room IDs.
///
/// A set is used as it is. Any other collection is copied into a set on the first look into it. A sync with nothing new
/// does not look into it.
struct PyRooms<'a, 'py> {
    given: Borrowed<'a, 'py, PyAny>,
    len: usize,
    set: OnceCell<Bound<'py, PyAny>>,
}

const ROOM_IDS: &str = "a set, list or other collection of str";

impl<'a, 'py> FromPyObject<'a, 'py> for PyRooms<'a, 'py> {
    type Error = Error;

    fn extract(given: Borrowed<'a, 'py, PyAny>) -> Result<Self, Error> {
        // A string is a collection of strings of one letter, but nobody means it as one.
        match given.len() {
            Ok(len) if !given.is_instance_of::<PyString>() => Ok(Self {
                given,
                len,
                set: OnceCell::new(),
            }),
            _ => Err(Error::wrong_type("room_ids", ROOM_IDS)),
        }
    }
}

impl<'py> PyRooms<'_, 'py> {
    fn set(&self) -> Result<&Bound<'py, PyAny>, Error> {
        let given = &self.given;
        if given.is_instance_of::<PySet>() || given.is_instance_of::<PyFrozenSet>() {
            return Ok(given);
        }
        if let Some(set) = self.set.get() {
            return Ok(set);
        }
        let set = given
            .py()
            .get_type::<PyFrozenSet>()
            .call1((given,))
            .map_err(|_| Error::wrong_type("room_ids", ROOM_IDS))?;
        Ok(self.set.get_or_init(|| set))
    }
}

impl Rooms for PyRooms<'_, '_> {
    type Error = PyErr;

    fn len(&self) -> usize {
        self.len
    }

    fn contains(&self, room_id: &str) -> PyResult<bool> {
        self.set()?.contains(room_id)
    }

    fn for_each(&self, mut visit: impl FnMut(&str)) -> PyResult<()> {
        for room_id in self.set()?.try_iter()? {
            visit(&text(&room_id?, "room_ids' items")?);
        }
        Ok(())
    }
}
