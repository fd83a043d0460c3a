//! The Rust core of synapse-sticky: the parts of MSC4354 (sticky events) that run once per event or once per sync.
//!
//! Every module but `python` is pure Rust: no Python, no clock, no I/O. Time is always an argument, in milliseconds
//! since the Unix epoch, and its name ends in `_ms`. "S1" and the like are the requirement IDs of
//! `docs/conformance.md`.

#![forbid(unsafe_code)]

pub mod error;
pub mod index;
pub mod limiter;
#[cfg(feature = "pyo3")]
pub mod python;
pub mod release;
pub mod rules;
mod steady;
