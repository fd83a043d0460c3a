//! The arguments of the Python functions, as types that PyO3 extracts.
//!
//! Each argument has a type of its own, which knows its name. PyO3 itself names a bad argument only in a note of the
//! exception, and Python 3.10 has no notes. Besides, PyO3 takes a bool for an int.

use std::collections::HashMap;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBool, PyFloat, PyInt, PyMapping, PyString, PyTuple};

use super::guarded::caught;
use crate::error::Error;

/// Defines the type of each argument: `function -> value { Type = "name" }`. The function converts the Python object.
macro_rules! arguments {
    ($($convert:ident -> $value:ty { $($argument:ident = $name:literal,)* })*) => {$($(
        pub(super) struct $argument(pub(super) $value);

        impl FromPyObject<'_, '_> for $argument {
            type Error = Error;

            fn extract(object: Borrowed<'_, '_, PyAny>) -> Result<Self, Error> {
                caught($name, || $convert(&object, $name))?.map(Self)
            }
        }
    )*)*};
}

arguments! {
    integer -> i64 {
        ExpiresAtMs = "expires_at_ms",
        FromStreamId = "from_stream_id",
        NewnessMs = "newness_ms",
        NowMs = "now_ms",
        ReceivedTsMs = "received_ts_ms",
        StickyKey = "key",
        StreamId = "stream_id",
        ToStreamId = "to_stream_id",
    }
    count -> usize {
        BurstCount = "burst_count",
        Capacity = "capacity",
        MaxBytes = "max_bytes",
        MaxEvents = "max_events",
        MaxFound = "limit",
        MaxKeys = "max_keys",
        MaxOldest = "max_oldest",
        MaxRows = "max_rows",
        SizeBytes = "size_bytes",
    }
    boolean -> bool {
        IsExempt = "is_exempt",
    }
    number -> f64 {
        PerSecond = "per_second",
    }
    text -> PyBackedStr {
        EventId = "event_id",
        InstanceName = "instance_name",
        LimitName = "limits' keys",
        Origin = "origin",
        RoomId = "room_id",
        Sender = "sender",
        Server = "server",
        ServerName = "server_name",
        UserId = "user_id",
    }
    writers -> HashMap<String, i64> {
        FromPositions = "from_positions",
        Positions = "positions",
        ToPositions = "to_positions",
    }
}

fn is_int(object: &Bound<'_, PyAny>) -> bool {
    object.is_instance_of::<PyInt>() && !object.is_instance_of::<PyBool>()
}

/// The number of 64 bits that is nearest to a Python int; `None` if the object is not an int.
pub(super) fn nearest(object: &Bound<'_, PyAny>) -> PyResult<Option<i64>> {
    if !is_int(object) {
        return Ok(None);
    }
    Ok(Some(match object.extract() {
        Ok(integer) => integer,
        Err(_) if object.lt(0)? => i64::MIN,
        Err(_) => i64::MAX,
    }))
}

fn integer(object: &Bound<'_, PyAny>, name: &str) -> Result<i64, Error> {
    if !is_int(object) {
        return Err(Error::wrong_type(name, "an int"));
    }
    object
        .extract()
        .map_err(|_| Error::bad_value(name, "an int of at most 64 bits"))
}

fn count(object: &Bound<'_, PyAny>, name: &str) -> Result<usize, Error> {
    usize::try_from(integer(object, name)?).map_err(|_| Error::bad_value(name, "an int, 0 or more"))
}

fn boolean(object: &Bound<'_, PyAny>, name: &str) -> Result<bool, Error> {
    object
        .extract()
        .map_err(|_| Error::wrong_type(name, "a bool"))
}

fn number(object: &Bound<'_, PyAny>, name: &str) -> Result<f64, Error> {
    if !is_int(object) && !object.is_instance_of::<PyFloat>() {
        return Err(Error::wrong_type(name, "an int or a float"));
    }
    object
        .extract()
        .map_err(|_| Error::bad_value(name, "a number that a float can hold"))
}

pub(super) fn text(object: &Bound<'_, PyAny>, name: &str) -> Result<PyBackedStr, Error> {
    if !object.is_instance_of::<PyString>() {
        return Err(Error::wrong_type(name, "a str"));
    }
    // Python's strings can hold half of a surrogate pair. UTF-8 and the database cannot.
    object
        .extract()
        .map_err(|_| Error::bad_value(name, "a str of valid Unicode"))
}

/// Converts positions by writer, from a dict or from the immutable mapping that Synapse's tokens hold.
fn writers(object: &Bound<'_, PyAny>, name: &str) -> Result<HashMap<String, i64>, Error> {
    let wrong_type = || Error::wrong_type(name, "a dict of str to int");
    let mapping = object.cast::<PyMapping>().map_err(|_| wrong_type())?;
    let mut writers = HashMap::new();
    if mapping.is_empty().map_err(|_| wrong_type())? {
        return Ok(writers);
    }
    for item in mapping.items().map_err(|_| wrong_type())? {
        let (writer, position): (Bound<'_, PyAny>, Bound<'_, PyAny>) =
            item.extract().map_err(|_| wrong_type())?;
        writers.insert(text(&writer, name)?.to_string(), integer(&position, name)?);
    }
    Ok(writers)
}

/// One tuple of an argument that is a list of tuples. Errors call it `rows[at]`.
pub(super) struct Row<'py> {
    tuple: Bound<'py, PyTuple>,
    at: usize,
}

impl<'py> Row<'py> {
    /// Reads all tuples of the argument called `name`. Each must have one of these numbers of fields, which
    /// `expected` describes.
    ///
    /// A database gives rows as tuples. Other sequences are more likely to be mistakes.
    pub(super) fn read_all<T>(
        rows: &Bound<'py, PyAny>,
        name: &str,
        lens: &[usize],
        expected: &'static str,
        read: impl Fn(&Self) -> PyResult<T>,
    ) -> PyResult<Vec<T>> {
        let rows = rows
            .try_iter()
            .map_err(|_| Error::wrong_type(name, "a list of tuples"))?;
        let rows = rows
            .enumerate()
            .map(|(at, row)| match row?.cast_into::<PyTuple>() {
                Ok(tuple) if lens.contains(&tuple.len()) => read(&Self { tuple, at }),
                Ok(_) => Err(Error::bad_value(format!("rows[{at}]"), expected).into()),
                Err(_) => Err(Error::wrong_type(format!("rows[{at}]"), expected).into()),
            });
        caught(name, || rows.collect())?
    }

    /// How many fields it has.
    pub(super) fn len(&self) -> usize {
        self.tuple.len()
    }

    /// The field of this number; `None` for Python's None.
    pub(super) fn optional_field<T>(&self, number: usize) -> PyResult<Option<T>>
    where
        T: for<'a> FromPyObject<'a, 'py, Error = Error>,
    {
        if self.tuple.get_item(number)?.is_none() {
            return Ok(None);
        }
        self.field(number).map(Some)
    }

    /// The field of this number.
    pub(super) fn field<T>(&self, number: usize) -> PyResult<T>
    where
        T: for<'a> FromPyObject<'a, 'py, Error = Error>,
    {
        let field = self.tuple.get_item(number)?;
        let in_row = |argument| format!("rows[{}].{argument}", self.at);
        let value = field.extract().map_err(|error| match error {
            Error::WrongType { argument, expected } => {
                Error::wrong_type(in_row(argument), expected)
            }
            Error::BadValue { argument, expected } => Error::bad_value(in_row(argument), expected),
            Error::Full | Error::Panicked { .. } => error,
        });
        Ok(value?)
    }
}
