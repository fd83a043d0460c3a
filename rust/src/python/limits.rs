//! `Limiter` and `ReleaseQueue`.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::arguments::{
    BurstCount, Capacity, EventId, ExpiresAtMs, IsExempt, LimitName, MaxEvents, NewnessMs, NowMs,
    Origin, PerSecond, RoomId, Row, Sender, Server, StickyKey, UserId,
};
use super::guarded::{caught, Guarded, OnPanic};
use crate::error::Error;
use crate::limiter::{Key, Limit, Limiter, Refusal, Scope};
use crate::release::{Deferred, ReleaseQueue};

#[pyclass(name = "Limiter", module = "synapse_sticky._core")]
pub(super) struct PyLimiter(Guarded<Limiter>);

/// The name of the option, and the ms until the limit would let the same pass.
type RefusalTuple = (&'static str, i64);

fn refused(decision: Result<(), Refusal>) -> Option<RefusalTuple> {
    decision
        .err()
        .map(|refusal| (refusal.scope.name(), refusal.retry_after_ms))
}

#[pymethods]
impl PyLimiter {
    #[new]
    #[pyo3(signature = (limits, capacity, *, on_panic=None))]
    fn new(limits: Limits, capacity: Capacity, on_panic: OnPanic) -> Result<Self, Error> {
        let make = || Limiter::new(limits.0, capacity.0);
        Guarded::new("Limiter", on_panic, make).map(Self)
    }

    fn admit_transaction(
        &mut self,
        origin: Origin,
        pdus: Claims,
        now_ms: NowMs,
    ) -> Result<Option<RefusalTuple>, Error> {
        let origin = &origin.0;
        let mut charges = Vec::with_capacity(pdus.0.len() * 3);
        for claim in &pdus.0 {
            charges.push((Key::Server(origin), 1));
            if let Some(RoomId(room_id)) = &claim.room_id {
                charges.push((Key::ServerInRoom(origin, room_id), 1));
                if let Some(Sender(sender)) = &claim.sender {
                    charges.push((Key::Sender(sender, room_id), 1));
                }
            }
        }
        self.0
            .write(|limiter| refused(limiter.admit(&charges, now_ms.0)))
    }

    fn admit_user(
        &mut self,
        user_id: UserId,
        now_ms: NowMs,
    ) -> Result<Option<RefusalTuple>, Error> {
        let charge = [(Key::User(&user_id.0), 1)];
        self.0
            .write(|limiter| refused(limiter.admit(&charge, now_ms.0)))
    }

    fn __len__(&self) -> Result<usize, Error> {
        self.0.read(Limiter::len)
    }
}

struct Limits(Vec<(Scope, Limit)>);

impl FromPyObject<'_, '_> for Limits {
    type Error = PyErr;

    fn extract(limits: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let wrong_type = || {
            let expected = "a dict of names of limits to tuples (per_second, burst_count)";
            Error::wrong_type("limits", expected)
        };
        let limits = limits.cast::<PyDict>().map_err(|_| wrong_type())?;
        let read = |(name, limit): (Bound<'_, PyAny>, Bound<'_, PyAny>)| {
            let LimitName(name) = name.extract()?;
            let scope = Scope::ALL
                .into_iter()
                .find(|scope| scope.name() == &*name)
                .ok_or_else(|| Error::bad_value("limits' keys", "names of limits"))?;
            let limit = limit.cast_into::<PyTuple>().map_err(|_| wrong_type())?;
            if limit.len() != 2 {
                return Err(wrong_type().into());
            }
            let (PerSecond(per_second), BurstCount(burst_count)) = limit.extract()?;
            let burst_count = u32::try_from(burst_count).unwrap_or(u32::MAX);
            Ok((scope, Limit::new(per_second, burst_count)?))
        };
        let read_all = || limits.iter().map(read).collect::<PyResult<_>>();
        caught("limits", read_all)?.map(Self)
    }
}

/// What a PDU claims about itself, as far as this server may believe it.
struct Claim {
    room_id: Option<RoomId>,
    sender: Option<Sender>,
}

struct Claims(Vec<Claim>);

impl FromPyObject<'_, '_> for Claims {
    type Error = PyErr;

    fn extract(pdus: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        const EXPECTED: &str = "a tuple (room_id, sender) of str or None";
        let read = |pdu: &Row<'_>| {
            Ok(Claim {
                room_id: pdu.field(0)?,
                sender: pdu.field(1)?,
            })
        };
        Row::read_all(&pdus, "pdus", &[2], EXPECTED, read).map(Self)
    }
}

#[pyclass(name = "ReleaseQueue", module = "synapse_sticky._core")]
pub(super) struct PyReleaseQueue(Guarded<ReleaseQueue>);

#[pymethods]
impl PyReleaseQueue {
    #[new]
    #[pyo3(signature = (*, on_panic=None))]
    fn new(on_panic: OnPanic) -> Result<Self, Error> {
        Guarded::new("ReleaseQueue", on_panic, ReleaseQueue::new).map(Self)
    }

    #[pyo3(signature = (limiter, room_id, server, sender, now_ms, *, is_exempt=IsExempt(false)))]
    fn admit(
        &self,
        limiter: &mut PyLimiter,
        room_id: RoomId,
        server: Server,
        sender: Sender,
        now_ms: NowMs,
        is_exempt: IsExempt,
    ) -> Result<Option<&'static str>, Error> {
        let charged = limiter.0.lent()?;
        let refused = self.0.read(|queue| {
            queue.admit(
                charged,
                &room_id.0,
                &server.0,
                &sender.0,
                is_exempt.0,
                now_ms.0,
            )
        });
        limiter.0.spoil(&refused);
        Ok(refused?.err().map(Scope::name))
    }

    #[allow(clippy::too_many_arguments)] // An event has that many properties.
    #[pyo3(signature = (
        event_id, room_id, server, sender, expires_at_ms, *, key=None, newness_ms=None,
        is_exempt=IsExempt(false),
    ))]
    fn add(
        &mut self,
        event_id: EventId,
        room_id: RoomId,
        server: Server,
        sender: Sender,
        expires_at_ms: ExpiresAtMs,
        key: Option<StickyKey>,
        newness_ms: Option<NewnessMs>,
        is_exempt: IsExempt,
    ) -> Result<bool, Error> {
        let event = Deferred {
            event_id: &event_id.0,
            room_id: &room_id.0,
            server: &server.0,
            sender: &sender.0,
            expires_at_ms: expires_at_ms.0,
            key: key.map(|key| key.0),
            newness_ms: newness_ms.map_or(expires_at_ms.0, |newness_ms| newness_ms.0),
            is_exempt: is_exempt.0,
        };
        self.0.write(|queue| queue.add(event))
    }

    fn remove(&mut self, event_id: EventId) -> Result<bool, Error> {
        self.0.write(|queue| queue.remove(&event_id.0))
    }

    fn take(
        &mut self,
        limiter: &mut PyLimiter,
        now_ms: NowMs,
        max_events: MaxEvents,
    ) -> Result<Vec<String>, Error> {
        let charged = limiter.0.lent()?;
        let taken = self
            .0
            .write(|queue| queue.take(charged, now_ms.0, max_events.0));
        limiter.0.spoil(&taken);
        taken
    }

    fn expire(&mut self, now_ms: NowMs, max_events: MaxEvents) -> Result<Vec<String>, Error> {
        self.0.write(|queue| queue.expire(now_ms.0, max_events.0))
    }

    fn next_due_ms(&self, now_ms: NowMs) -> Result<Option<i64>, Error> {
        self.0.read(|queue| queue.next_due_ms(now_ms.0))
    }

    fn waiting(&self, server: Server) -> Result<usize, Error> {
        self.0.read(|queue| queue.waiting(&server.0))
    }

    fn __len__(&self) -> Result<usize, Error> {
        self.0.read(ReleaseQueue::len)
    }

    fn __contains__(&self, event_id: EventId) -> Result<bool, Error> {
        self.0.read(|queue| queue.contains(&event_id.0))
    }
}
