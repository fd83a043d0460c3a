//! What this crate may refuse, in one enum. `python.rs` turns it into Python exceptions, in one place.

use std::fmt;

/// A refusal. Nothing has been changed when a function returns one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// An argument is of the wrong type (`TypeError` in Python).
    WrongType {
        /// The argument's name, such as `now_ms` or `rows[3].sender`.
        argument: String,
        /// What it must be.
        expected: &'static str,
    },
    /// An argument is of the right type but cannot be used (`ValueError` in Python).
    BadValue {
        /// The argument's name, such as `limit` or `rows[3].stream_id`.
        argument: String,
        /// What it must be.
        expected: &'static str,
    },
    /// The index has as many rows as it can number, 2^32 - 1 (`MemoryError` in Python).
    Full,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WrongType { argument, expected } | Self::BadValue { argument, expected } => {
                write!(f, "{argument} must be {expected}")
            }
            Self::Full => write!(f, "the index is full"),
        }
    }
}

impl std::error::Error for Error {}
