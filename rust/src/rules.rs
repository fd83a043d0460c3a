//! What is sticky, and until when (MSC4354; S1, S2).
//!
//! Other servers choose the values. So the functions take any value, and no sum overflows.

/// The longest time that an event can be sticky, one hour (MSC4354; S1). A longer duration counts as one hour.
pub const MAX_STICKY_DURATION_MS: i64 = 3_600_000;

/// A JSON value that is only of use if it is an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// A JSON integer. One that does not fit into 64 bits is given as the nearest that does.
    Integer(i64),
    /// Any other JSON value. Booleans and floats are not integers, not even `1.0`.
    NotInteger,
}

/// The value of an event's top-level `msc4354_sticky`, reduced to what the rules ask of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// A JSON object.
    Object {
        /// The value under `duration_ms`; `None` if the object has no such key.
        duration_ms: Option<Value>,
    },
    /// Any other JSON value, or no value at all.
    NotObject,
}

/// When an event stops being sticky, in ms since the Unix epoch; `None` if it is not sticky (MSC4354; S1, S2).
///
/// An event is sticky if `field` has an integer duration of 0 or more and `origin_server_ts` is an integer. It starts
/// to be sticky when this server received it or when its sender claims to have sent it, whichever is earlier. So a
/// claim in the future does not prolong the time. A duration of 0 is valid: the time is over as soon as it starts.
///
/// Where this server enforces retention, an event may end earlier for it: `homeserver/retention.py` says when.
#[must_use]
pub const fn sticky_until_ms(
    field: Field,
    origin_server_ts: Value,
    received_ts_ms: i64,
) -> Option<i64> {
    let Field::Object {
        duration_ms: Some(Value::Integer(duration_ms)),
    } = field
    else {
        return None;
    };
    let Value::Integer(sent_ts_ms) = origin_server_ts else {
        return None;
    };
    if duration_ms < 0 {
        return None;
    }
    // By hand, since `Ord::min` is not const.
    let duration_ms = if duration_ms < MAX_STICKY_DURATION_MS {
        duration_ms
    } else {
        MAX_STICKY_DURATION_MS
    };
    let start_ms = if sent_ts_ms < received_ts_ms {
        sent_ts_ms
    } else {
        received_ts_ms
    };
    Some(start_ms.saturating_add(duration_ms))
}

/// Whether an event that is sticky until `until_ms` is still sticky at `now_ms`: strictly before its end (MSC4354; S2).
#[must_use]
pub const fn is_unexpired(until_ms: i64, now_ms: i64) -> bool {
    until_ms > now_ms
}
