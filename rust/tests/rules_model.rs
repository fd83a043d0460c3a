//! The rules against their definition in wider arithmetic (S1, S2).

use _core::rules::{is_unexpired, sticky_until_ms, Field, Value, MAX_STICKY_DURATION_MS};
use proptest::prelude::*;

fn field(duration_ms: Value) -> Field {
    Field::Object {
        duration_ms: Some(duration_ms),
    }
}

/// How long an event with this field is sticky.
fn duration(field: Field) -> Option<i64> {
    sticky_until_ms(field, Value::Integer(0), 0)
}

fn until(duration_ms: i64, origin_server_ts: i64, received_ts_ms: i64) -> Option<i64> {
    let field = field(Value::Integer(duration_ms));
    sticky_until_ms(field, Value::Integer(origin_server_ts), received_ts_ms)
}

/// Any number, and more often one at an edge.
fn number() -> impl Strategy<Value = i64> {
    prop_oneof![
        any::<i64>(),
        -2..=2_i64,
        MAX_STICKY_DURATION_MS - 2..=MAX_STICKY_DURATION_MS + 2,
        i64::MIN..=i64::MIN + MAX_STICKY_DURATION_MS,
        i64::MAX - MAX_STICKY_DURATION_MS..=i64::MAX,
    ]
}

#[test]
fn only_an_object_with_an_integer_duration_is_sticky() {
    assert_eq!(duration(Field::NotObject), None);
    assert_eq!(duration(Field::Object { duration_ms: None }), None);
    assert_eq!(duration(field(Value::NotInteger)), None);
    assert_eq!(duration(field(Value::Integer(-1))), None);
    assert_eq!(duration(field(Value::Integer(0))), Some(0));
    assert_eq!(duration(field(Value::Integer(3_600_000))), Some(3_600_000));
    assert_eq!(duration(field(Value::Integer(3_600_001))), Some(3_600_000));
    assert_eq!(duration(field(Value::Integer(i64::MAX))), Some(3_600_000));
}

#[test]
fn only_an_event_with_an_integer_time_is_sticky() {
    let field = field(Value::Integer(10));
    assert_eq!(sticky_until_ms(field, Value::NotInteger, 0), None);
    assert_eq!(sticky_until_ms(field, Value::Integer(0), 0), Some(10));
}

#[test]
fn it_is_sticky_until_strictly_before_its_end() {
    assert!(is_unexpired(10, 9));
    assert!(!is_unexpired(10, 10));
}

proptest! {
    #[test]
    fn durations_are_held_to_an_hour(asked_ms in number()) {
        let expected = (asked_ms >= 0).then(|| asked_ms.min(MAX_STICKY_DURATION_MS));
        prop_assert_eq!(duration(field(Value::Integer(asked_ms))), expected);
    }

    #[test]
    fn the_end_follows_the_earlier_start(
        duration_ms in number(),
        origin_server_ts in number(),
        received_ts_ms in number(),
    ) {
        let start = i128::from(origin_server_ts.min(received_ts_ms));
        let end = start + i128::from(duration_ms.min(MAX_STICKY_DURATION_MS));
        let expected = (duration_ms >= 0).then(|| i64::try_from(end).unwrap_or(i64::MAX));
        prop_assert_eq!(until(duration_ms, origin_server_ts, received_ts_ms), expected);
    }

    #[test]
    fn the_future_never_prolongs(duration_ms in number(), origin in number(), received in number()) {
        if let Some(ahead_ms) = until(duration_ms, received.max(origin), received) {
            prop_assert!(ahead_ms <= received.saturating_add(MAX_STICKY_DURATION_MS));
        }
    }
}
