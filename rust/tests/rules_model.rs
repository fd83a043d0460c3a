//! The rules against their definition in the widest arithmetic there is (S1, S2).

use _core::rules::{
    is_unexpired, sticky_duration_ms, sticky_until_ms, Field, Value, MAX_STICKY_DURATION_MS,
};
use proptest::prelude::*;

fn duration(value: Value) -> Option<i64> {
    sticky_duration_ms(Some(&Field::Object {
        duration_ms: Some(value),
    }))
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
    let without_duration = Field::Object { duration_ms: None };
    assert_eq!(sticky_duration_ms(None), None);
    assert_eq!(sticky_duration_ms(Some(&Field::NotObject)), None);
    assert_eq!(sticky_duration_ms(Some(&without_duration)), None);
    assert_eq!(duration(Value::NotInteger), None);
    assert_eq!(duration(Value::Integer(-1)), None);
    assert_eq!(duration(Value::Integer(0)), Some(0));
    assert_eq!(duration(Value::Integer(3_600_000)), Some(3_600_000));
    assert_eq!(duration(Value::Integer(3_600_001)), Some(3_600_000));
    assert_eq!(duration(Value::Integer(i64::MAX)), Some(3_600_000));
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
        prop_assert_eq!(duration(Value::Integer(asked_ms)), expected);
    }

    #[test]
    fn the_end_follows_the_earlier_start(
        duration_ms in number(),
        origin_server_ts_ms in number(),
        received_ts_ms in number(),
    ) {
        let start = i128::from(origin_server_ts_ms.min(received_ts_ms));
        let end = start + i128::from(duration_ms.clamp(0, MAX_STICKY_DURATION_MS));
        let expected = i64::try_from(end).unwrap_or(i64::MAX);
        prop_assert_eq!(sticky_until_ms(duration_ms, origin_server_ts_ms, received_ts_ms), expected);
    }

    #[test]
    fn the_future_never_prolongs(duration_ms in number(), origin in number(), received in number()) {
        let ahead = sticky_until_ms(duration_ms, received.max(origin), received);
        prop_assert!(ahead <= received.saturating_add(MAX_STICKY_DURATION_MS));
    }
}
