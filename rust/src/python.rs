//! The Python face of the crate, `synapse_sticky._core`: nothing outside this module knows PyO3. What it offers is documented in
//! `synapse_sticky/_core.pyi`.

mod arguments;
mod limits;

use std::cell::OnceCell;
use std::collections::BTreeMap;

use pyo3::exceptions::{PyMemoryError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyDict, PyFrozenSet, PyList, PySet, PyString, PyTuple};

use crate::error::Error;
use crate::index::{NewRow, Position, Range, Rooms, StickyIndex};
use crate::rules;
use arguments::{bad_value, count, integer, json_field, nearest, text, writers, wrong_type};

type Any<'py> = Bound<'py, PyAny>;
/// `(stream_id, room_id, event_id, sender, expires_at_ms)`
type FoundTuple<'a> = (i64, &'a str, &'a str, &'a str, i64);

/// Every refusal of this crate as the Python exception for it.
impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::WrongType { .. } => PyTypeError::new_err(message),
            Error::BadValue { .. } => PyValueError::new_err(message),
            Error::Full => PyMemoryError::new_err(message),
        }
    }
}

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::limits::{PyLimiter, PyReleaseQueue};
    #[pymodule_export]
    use super::{sticky_duration_ms, sticky_until_ms, PyStickyIndex};

    #[pymodule_export]
    const MAX_STICKY_DURATION_MS: i64 = crate::rules::MAX_STICKY_DURATION_MS;
}

#[pyfunction]
#[pyo3(signature = (field, /))]
fn sticky_duration_ms(field: &Any<'_>) -> PyResult<Option<i64>> {
    Ok(rules::sticky_duration_ms(Some(&json_field(field)?)))
}

#[pyfunction]
fn sticky_until_ms(
    duration_ms: &Any<'_>,
    origin_server_ts_ms: &Any<'_>,
    received_ts_ms: &Any<'_>,
) -> PyResult<i64> {
    // Other servers choose the first two, so the nearest number will do where another would be refused.
    Ok(rules::sticky_until_ms(
        nearest(duration_ms, "duration_ms")?,
        nearest(origin_server_ts_ms, "origin_server_ts_ms")?,
        nearest(received_ts_ms, "received_ts_ms")?,
    ))
}

#[pyclass(name = "StickyIndex", module = "synapse_sticky._core")]
struct PyStickyIndex(StickyIndex);

#[pymethods]
impl PyStickyIndex {
    #[new]
    fn new(server_name: &Any<'_>) -> PyResult<Self> {
        let server_name = text(server_name, "server_name")?;
        if server_name.is_empty() {
            return Err(bad_value("server_name", "the name of a server, not empty").into());
        }
        Ok(Self(StickyIndex::new(&server_name)))
    }

    fn insert(&mut self, rows: &Any<'_>) -> PyResult<()> {
        // All are read before any is taken in, so that a bad one leaves the index as it was.
        let rows: Vec<OwnedRow> = rows
            .try_iter()
            .map_err(|_| wrong_type("rows", "a list of tuples"))?
            .enumerate()
            .map(|(at, row)| OwnedRow::read(&row?, at))
            .collect::<PyResult<_>>()?;
        for row in &rows {
            self.0.insert(row.as_new())?;
        }
        Ok(())
    }

    fn remove(&mut self, event_id: &Any<'_>) -> PyResult<bool> {
        Ok(self.0.remove(&text(event_id, "event_id")?))
    }

    fn remove_room(&mut self, room_id: &Any<'_>) -> PyResult<usize> {
        Ok(self.0.remove_room(&text(room_id, "room_id")?))
    }

    fn expire(&mut self, now_ms: &Any<'_>, max_rows: &Any<'_>) -> PyResult<usize> {
        Ok(self
            .0
            .expire(integer(now_ms, "now_ms")?, count(max_rows, "max_rows")?))
    }

    fn advance(&mut self, instance_name: &Any<'_>, stream_id: &Any<'_>) -> PyResult<()> {
        self.0.advance(
            &text(instance_name, "instance_name")?,
            integer(stream_id, "stream_id")?,
        );
        Ok(())
    }

    fn positions(&self) -> BTreeMap<String, i64> {
        self.0.positions().clone()
    }

    fn in_step(&self, positions: &Any<'_>) -> PyResult<bool> {
        let positions = writers(positions, "positions")?;
        Ok(self
            .0
            .in_step(positions.iter().map(|(name, at)| (name.as_str(), *at))))
    }

    #[allow(clippy::too_many_arguments)] // Two positions are two arguments each: what Synapse's tokens consist of.
    fn events_in_rooms<'py>(
        &self,
        py: Python<'py>,
        room_ids: &Any<'py>,
        from_stream_id: &Any<'py>,
        from_positions: &Any<'py>,
        to_stream_id: &Any<'py>,
        to_positions: &Any<'py>,
        now_ms: &Any<'py>,
        limit: &Any<'py>,
    ) -> PyResult<Bound<'py, PyList>> {
        let range = range(from_stream_id, from_positions, to_stream_id, to_positions)?;
        let now_ms = integer(now_ms, "now_ms")?;
        let rooms = PyRooms::read(room_ids)?;
        let found = self
            .0
            .events_in_rooms(&rooms, &range, now_ms, at_most(limit)?)?;
        let tuples = found
            .iter()
            .map(|row| (row.stream_id, row.room_id, row.event_id));
        PyList::new(py, tuples)
    }

    #[allow(clippy::too_many_arguments)] // As above.
    fn events_by_room<'py>(
        &self,
        py: Python<'py>,
        room_ids: &Any<'py>,
        from_stream_id: &Any<'py>,
        from_positions: &Any<'py>,
        to_stream_id: &Any<'py>,
        to_positions: &Any<'py>,
        now_ms: &Any<'py>,
        limit: &Any<'py>,
    ) -> PyResult<(Bound<'py, PyDict>, usize, Option<i64>)> {
        let range = range(from_stream_id, from_positions, to_stream_id, to_positions)?;
        let now_ms = integer(now_ms, "now_ms")?;
        let rooms = PyRooms::read(room_ids)?;
        let found = self
            .0
            .events_by_room(&rooms, &range, now_ms, at_most(limit)?)?;
        let by_room = PyDict::new(py);
        for (room_id, event_ids) in &found.rooms {
            by_room.set_item(room_id, PyList::new(py, event_ids)?)?;
        }
        Ok((by_room, found.count, found.last_stream_id))
    }

    fn own_events(
        &self,
        room_id: &Any<'_>,
        from_stream_id: &Any<'_>,
        now_ms: &Any<'_>,
        limit: &Any<'_>,
    ) -> PyResult<Vec<(i64, &str, &str)>> {
        Ok(self
            .0
            .own_events(
                &text(room_id, "room_id")?,
                integer(from_stream_id, "from_stream_id")?,
                integer(now_ms, "now_ms")?,
                count(limit, "limit")?,
            )
            .map(|found| (found.stream_id, found.event_id, found.sender))
            .collect())
    }

    fn servers_in_room(&mut self, room_id: &Any<'_>, now_ms: &Any<'_>) -> PyResult<Vec<&str>> {
        let room_id = text(room_id, "room_id")?;
        Ok(self.0.servers_in_room(&room_id, integer(now_ms, "now_ms")?))
    }

    fn get(&self, event_id: &Any<'_>) -> PyResult<Option<FoundTuple<'_>>> {
        Ok(self.0.get(&text(event_id, "event_id")?).map(|found| {
            (
                found.stream_id,
                found.room_id,
                found.event_id,
                found.sender,
                found.expires_at_ms,
            )
        }))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __contains__(&self, event_id: &Any<'_>) -> PyResult<bool> {
        Ok(self.0.contains(&text(event_id, "event_id")?))
    }
}

fn range(
    from_stream_id: &Any<'_>,
    from_positions: &Any<'_>,
    to_stream_id: &Any<'_>,
    to_positions: &Any<'_>,
) -> PyResult<Range> {
    Ok(Range {
        after: Position {
            stream_id: integer(from_stream_id, "from_stream_id")?,
            writers: writers(from_positions, "from_positions")?,
        },
        up_to: Position {
            stream_id: integer(to_stream_id, "to_stream_id")?,
            writers: writers(to_positions, "to_positions")?,
        },
    })
}

fn at_most(limit: &Any<'_>) -> PyResult<Option<usize>> {
    (!limit.is_none())
        .then(|| count(limit, "limit"))
        .transpose()
}

/// A row of `StickyIndex.insert`. The strings stay Python's.
struct OwnedRow {
    stream_id: i64,
    instance_name: PyBackedStr,
    room_id: PyBackedStr,
    event_id: PyBackedStr,
    sender: PyBackedStr,
    expires_at_ms: i64,
}

impl OwnedRow {
    fn read(row: &Any<'_>, at: usize) -> PyResult<Self> {
        const FIELDS: &str =
            "a tuple (stream_id, instance_name, room_id, event_id, sender, expires_at_ms)";
        // Rows of a database are tuples; other sequences are more likely to be mistakes.
        let row = match row.cast::<PyTuple>() {
            Ok(row) if row.len() == 6 => row,
            Ok(_) => return Err(bad_value((at, ""), FIELDS).into()),
            Err(_) => return Err(wrong_type((at, ""), FIELDS).into()),
        };
        Ok(Self {
            stream_id: integer(&row.get_item(0)?, (at, ".stream_id"))?,
            instance_name: text(&row.get_item(1)?, (at, ".instance_name"))?,
            room_id: text(&row.get_item(2)?, (at, ".room_id"))?,
            event_id: text(&row.get_item(3)?, (at, ".event_id"))?,
            sender: text(&row.get_item(4)?, (at, ".sender"))?,
            expires_at_ms: integer(&row.get_item(5)?, (at, ".expires_at_ms"))?,
        })
    }

    fn as_new(&self) -> NewRow<'_> {
        NewRow {
            stream_id: self.stream_id,
            instance_name: &self.instance_name,
            room_id: &self.room_id,
            event_id: &self.event_id,
            sender: &self.sender,
            expires_at_ms: self.expires_at_ms,
        }
    }
}

/// A Python collection of room IDs. A set is used as it is, another is made one of when first looked into: a sync with nothing new
/// never does.
struct PyRooms<'py> {
    given: Any<'py>,
    len: usize,
    set: OnceCell<Any<'py>>,
}

impl<'py> PyRooms<'py> {
    const EXPECTED: &'static str = "a set, list or other collection of str";

    fn read(given: &Any<'py>) -> PyResult<Self> {
        // A string is a collection of one-letter strings, but never meant as one.
        match given.len() {
            Ok(len) if !given.is_instance_of::<PyString>() => Ok(Self {
                given: given.clone(),
                len,
                set: OnceCell::new(),
            }),
            _ => Err(wrong_type("room_ids", Self::EXPECTED).into()),
        }
    }

    fn set(&self) -> PyResult<&Any<'py>> {
        if let Some(set) = self.set.get() {
            return Ok(set);
        }
        let given = &self.given;
        let is_set = given.is_instance_of::<PySet>() || given.is_instance_of::<PyFrozenSet>();
        let set = if is_set {
            given.clone()
        } else {
            given
                .py()
                .get_type::<PyFrozenSet>()
                .call1((given,))
                .map_err(|_| wrong_type("room_ids", Self::EXPECTED))?
        };
        Ok(self.set.get_or_init(|| set))
    }
}

impl Rooms for PyRooms<'_> {
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
