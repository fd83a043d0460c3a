//! Python's arguments into this crate's types.
//!
//! By hand rather than by PyO3: so that every refusal names the argument, so that a bool is not taken for an int, and so that an int
//! too large for the crate is a `ValueError`.

use std::collections::HashMap;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyMapping, PyString};

use super::Any;
use crate::error::Error;
use crate::rules::{Field, Value};

/// What an argument is called in an error message. Only put together if there is one.
pub(super) enum Argument {
    Named(&'static str),
    InRow(usize, &'static str),
}

impl From<&'static str> for Argument {
    fn from(name: &'static str) -> Self {
        Self::Named(name)
    }
}

impl From<(usize, &'static str)> for Argument {
    fn from((at, field): (usize, &'static str)) -> Self {
        Self::InRow(at, field)
    }
}

impl From<Argument> for String {
    fn from(argument: Argument) -> Self {
        match argument {
            Argument::Named(name) => name.to_owned(),
            Argument::InRow(at, field) => format!("rows[{at}]{field}"),
        }
    }
}

pub(super) fn wrong_type(argument: impl Into<Argument>, expected: &'static str) -> Error {
    let argument = argument.into().into();
    Error::WrongType { argument, expected }
}

pub(super) fn bad_value(argument: impl Into<Argument>, expected: &'static str) -> Error {
    let argument = argument.into().into();
    Error::BadValue { argument, expected }
}

pub(super) fn text(object: &Any<'_>, argument: impl Into<Argument>) -> Result<PyBackedStr, Error> {
    match object.cast::<PyString>() {
        Ok(text) => PyBackedStr::try_from(text.clone())
            // Half of a surrogate pair: Python's strings can hold it, UTF-8 and the database cannot.
            .map_err(|_| bad_value(argument, "a str of valid Unicode")),
        Err(_) => Err(wrong_type(argument, "a str")),
    }
}

/// A Python int that is not a bool, or the nearest number that an `i64` can hold; `None` if it is no int.
fn saturated(object: &Any<'_>) -> PyResult<Option<(i64, bool)>> {
    if object.is_instance_of::<PyBool>() || !object.is_instance_of::<PyInt>() {
        return Ok(None);
    }
    Ok(Some(match object.extract() {
        Ok(integer) => (integer, true),
        Err(_) if object.lt(0)? => (i64::MIN, false),
        Err(_) => (i64::MAX, false),
    }))
}

pub(super) fn nearest(object: &Any<'_>, argument: impl Into<Argument>) -> PyResult<i64> {
    match saturated(object)? {
        Some((integer, _)) => Ok(integer),
        None => Err(wrong_type(argument, "an int").into()),
    }
}

pub(super) fn integer(object: &Any<'_>, argument: impl Into<Argument>) -> PyResult<i64> {
    match saturated(object)? {
        Some((integer, true)) => Ok(integer),
        Some(_) => Err(bad_value(argument, "an int of at most 64 bits").into()),
        None => Err(wrong_type(argument, "an int").into()),
    }
}

pub(super) fn count(object: &Any<'_>, argument: &'static str) -> PyResult<usize> {
    usize::try_from(integer(object, argument)?)
        .map_err(|_| bad_value(argument, "an int, 0 or more").into())
}

pub(super) fn number(object: &Any<'_>, argument: &'static str) -> PyResult<f64> {
    if object.is_instance_of::<PyBool>()
        || !(object.is_instance_of::<PyInt>() || object.is_instance_of::<PyFloat>())
    {
        return Err(wrong_type(argument, "an int or a float").into());
    }
    object
        .extract()
        .map_err(|_| bad_value(argument, "a number that a float can hold").into())
}

/// Positions by writer, from a dict or from the immutable one that Synapse's tokens hold.
pub(super) fn writers(object: &Any<'_>, argument: &'static str) -> PyResult<HashMap<String, i64>> {
    const EXPECTED: &str = "a dict of str to int";
    let mapping = object
        .cast::<PyMapping>()
        .map_err(|_| wrong_type(argument, EXPECTED))?;
    let mut writers = HashMap::new();
    if mapping.is_empty()? {
        return Ok(writers);
    }
    for item in mapping.items()? {
        let (name, position): (Any<'_>, Any<'_>) = item.extract()?;
        writers.insert(
            text(&name, argument)?.to_string(),
            integer(&position, argument)?,
        );
    }
    Ok(writers)
}

/// What [`crate::rules::sticky_duration_ms`] needs to know of a JSON value. An object may be any mapping: events may be frozen.
pub(super) fn json_field(field: &Any<'_>) -> PyResult<Field> {
    const KEY: &str = "duration_ms";
    let duration_ms = if let Ok(object) = field.cast::<PyDict>() {
        object.get_item(KEY)?
    } else if let Ok(object) = field.cast::<PyMapping>() {
        match object.contains(KEY)? {
            true => Some(object.get_item(KEY)?),
            false => None,
        }
    } else {
        return Ok(Field::NotObject);
    };
    let duration_ms = match duration_ms {
        None => None,
        Some(value) => Some(match saturated(&value)? {
            Some((integer, _)) => Value::Integer(integer),
            None => Value::NotInteger,
        }),
    };
    Ok(Field::Object { duration_ms })
}
