//! What is sticky, and until when (MSC4354; S1, S2).
//!
//! The values come from other servers, so every function takes anything and none can overflow.

/// The longest that an event can be sticky, one hour (MSC4354; S1). A longer duration counts as this one.
pub const MAX_STICKY_DURATION_MS: i64 = 3_600_000;

/// The value of an event's top-level `msc4354_sticky`, reduced to what [`sticky_duration_ms`] needs to know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// A JSON object, with its `duration_ms` if it has one.
    Object {
        /// The value under `duration_ms`; `None` if there is no such key.
        duration_ms: Option<Value>,
    },
    /// Any other JSON value.
    NotObject,
}

/// The value of `duration_ms`, reduced likewise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// A JSON integer. One that does not fit is given as the nearest that does: what counts is which side of 0 and of
    /// [`MAX_STICKY_DURATION_MS`] it is on.
    Integer(i64),
    /// Any other JSON value: booleans and floats too, even `1.0`.
    NotInteger,
}

/// How long an event asks to be sticky, in ms, 0 to [`MAX_STICKY_DURATION_MS`]; `None` if it is not sticky at all (MSC4354; S1).
///
/// `field` is `None` if the event has no such field. A duration of 0 is valid, and over as soon as it begins.
#[must_use]
pub const fn sticky_duration_ms(field: Option<&Field>) -> Option<i64> {
    match field {
        Some(Field::Object {
            duration_ms: Some(Value::Integer(duration_ms)),
        }) if *duration_ms >= 0 => Some(clamp(*duration_ms)),
        _ => None,
    }
}

/// When an event stops being sticky, in ms since the Unix epoch (MSC4354; S2).
///
/// It starts when it was received or when its sender says that it was sent, whichever is earlier: a time in the future never
/// prolongs it. `duration_ms` is held to 0..=[`MAX_STICKY_DURATION_MS`] once more, whoever it comes from.
#[must_use]
pub const fn sticky_until_ms(
    duration_ms: i64,
    origin_server_ts_ms: i64,
    received_ts_ms: i64,
) -> i64 {
    let start_ms = if origin_server_ts_ms < received_ts_ms {
        origin_server_ts_ms
    } else {
        received_ts_ms
    };
    start_ms.saturating_add(clamp(duration_ms))
}

/// Whether an event that is sticky until `until_ms` still is at `now_ms`: strictly before its end (MSC4354; S2).
#[must_use]
pub const fn is_unexpired(until_ms: i64, now_ms: i64) -> bool {
    until_ms > now_ms
}

/// `duration_ms` held to 0..=[`MAX_STICKY_DURATION_MS`]. By hand, since `Ord::clamp` is not const.
const fn clamp(duration_ms: i64) -> i64 {
    if duration_ms < 0 {
        0
    } else if duration_ms > MAX_STICKY_DURATION_MS {
        MAX_STICKY_DURATION_MS
    } else {
        duration_ms
    }
}
