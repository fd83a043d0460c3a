//! The Python face of the crate, `synapse_sticky._core`. No other module knows PyO3.
//!
//! `synapse_sticky/_core.pyi` documents what it offers.

mod arguments;
mod guarded;
mod index;
mod limits;
#[cfg(feature = "panics")]
mod panics;

use pyo3::exceptions::{PyMemoryError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping};

use crate::error::Error;
use crate::rules::{self, Field, Value};
use arguments::{nearest, ReceivedTsMs};
use errors::PanickedError;
use guarded::caught;

/// Converts every error of this crate to the Python exception for it.
impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::WrongType { .. } => PyTypeError::new_err(message),
            Error::BadValue { .. } => PyValueError::new_err(message),
            Error::Full => PyMemoryError::new_err(message),
            Error::Panicked { .. } => PanickedError::new_err(message),
        }
    }
}

#[allow(unreachable_pub)] // The macro makes it so.
mod errors {
    pyo3::create_exception!(
        synapse_sticky._core,
        PanickedError,
        pyo3::exceptions::PyRuntimeError
    );
}

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::errors::PanickedError;
    #[pymodule_export]
    use super::index::PyStickyIndex;
    #[pymodule_export]
    use super::limits::{PyLimiter, PyReleaseQueue};
    #[pymodule_export]
    use super::sticky_until_ms;

    #[pymodule_export]
    const MAX_STICKY_DURATION_MS: i64 = crate::rules::MAX_STICKY_DURATION_MS;

    #[pymodule_init]
    fn init(_module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        #[cfg(feature = "panics")]
        super::panics::add_to(_module)?;
        Ok(())
    }
}

#[pyfunction]
fn sticky_until_ms(
    field: Field,
    origin_server_ts: Value,
    received_ts_ms: ReceivedTsMs,
) -> Result<Option<i64>, Error> {
    caught("sticky_until_ms", || {
        rules::sticky_until_ms(field, origin_server_ts, received_ts_ms.0)
    })
}

/// Synapse may freeze events. So any mapping counts as a JSON object.
impl FromPyObject<'_, '_> for Field {
    type Error = PyErr;

    fn extract(field: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        caught("field", || read_field(&field))?
    }
}

impl FromPyObject<'_, '_> for Value {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let nearest = caught("origin_server_ts", || nearest(&value))?;
        Ok(nearest?.map_or(Self::NotInteger, Self::Integer))
    }
}

fn read_field(field: &Bound<'_, PyAny>) -> PyResult<Field> {
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
    let duration_ms = duration_ms.map(|value| value.extract()).transpose()?;
    Ok(Field::Object { duration_ms })
}
