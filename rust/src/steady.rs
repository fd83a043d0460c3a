//! A time that never goes back, derived from a clock that may.

/// Follows a wall clock forwards, and stands still when the clock is set back. So what was due in a minute remains due
/// in a minute.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SteadyTime {
    last_now_ms: i64,
    lost_ms: i64,
}

impl SteadyTime {
    pub(crate) const fn new() -> Self {
        Self {
            last_now_ms: i64::MIN,
            lost_ms: 0,
        }
    }

    /// The steady time at this wall-clock time, both in ms.
    pub(crate) const fn at(&mut self, now_ms: i64) -> i64 {
        if now_ms < self.last_now_ms {
            let set_back_ms = self.last_now_ms.saturating_sub(now_ms);
            self.lost_ms = self.lost_ms.saturating_add(set_back_ms);
        }
        self.last_now_ms = now_ms;
        now_ms.saturating_add(self.lost_ms)
    }
}
