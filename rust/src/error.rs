//! The errors of this crate, in one enum. `python.rs` converts them to Python exceptions, in one place.

use std::fmt;

/// Why a call failed. A function that returns one of these but `Panicked` has changed nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// An argument has the wrong type (`TypeError` in Python).
    WrongType {
        /// The argument's name, such as `now_ms` or `rows[3].sender`.
        argument: String,
        /// What the argument must be.
        expected: &'static str,
    },
    /// An argument has the right type but an unusable value (`ValueError` in Python).
    BadValue {
        /// The argument's name, such as `limit` or `rows[3].stream_id`.
        argument: String,
        /// What the argument must be.
        expected: &'static str,
    },
    /// The index has as many rows as it can number, 2^32 - 1 (`MemoryError` in Python).
    Full,
    /// This crate has panicked, which is a bug (`PanickedError` in Python). What was called may have changed anything.
    Panicked {
        /// The class, function or argument, such as `StickyIndex`.
        what: String,
        /// The panic's own message.
        message: String,
    },
}

impl Error {
    /// The argument of this name has the wrong type.
    pub fn wrong_type(argument: impl Into<String>, expected: &'static str) -> Self {
        let argument = argument.into();
        Self::WrongType { argument, expected }
    }

    /// The argument of this name has an unusable value.
    pub fn bad_value(argument: impl Into<String>, expected: &'static str) -> Self {
        let argument = argument.into();
        Self::BadValue { argument, expected }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WrongType { argument, expected } | Self::BadValue { argument, expected } => {
                write!(f, "{argument} must be {expected}")
            }
            Self::Full => write!(f, "the index is full"),
            Self::Panicked { what, message } => write!(f, "{what} panicked in Rust: {message}"),
        }
    }
}

impl std::error::Error for Error {}
