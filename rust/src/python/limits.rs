//! `Limiter` and `ReleaseQueue`.

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyDict, PyTuple};

use super::arguments::{bad_value, count, integer, number, text, wrong_type};
use super::Any;
use crate::limiter::{Key, Limit, Limiter, Refusal, Scope};
use crate::release::{Deferred, ReleaseQueue};

#[pyclass(name = "Limiter", module = "synapse_sticky._core")]
pub(super) struct PyLimiter(Limiter);

/// The option's name and the ms until it would pass.
type RefusalTuple = (&'static str, i64);

fn refused(decision: Result<(), Refusal>) -> Option<RefusalTuple> {
    decision
        .err()
        .map(|refusal| (refusal.scope.name(), refusal.retry_after_ms))
}

#[pymethods]
impl PyLimiter {
    #[new]
    fn new(limits: &Any<'_>, capacity: &Any<'_>) -> PyResult<Self> {
        const EXPECTED: &str = "a dict of names of limits to tuples (per_second, burst_count)";
        let limits = limits
            .cast::<PyDict>()
            .map_err(|_| wrong_type("limits", EXPECTED))?;
        let mut read = Vec::with_capacity(limits.len());
        for (name, limit) in limits {
            let name = text(&name, "limits' keys")?;
            let scope = Scope::ALL
                .into_iter()
                .find(|scope| scope.name() == &*name)
                .ok_or_else(|| bad_value("limits' keys", "names of limits"))?;
            let limit = match limit.cast::<PyTuple>() {
                Ok(limit) if limit.len() == 2 => limit,
                _ => return Err(wrong_type("limits", EXPECTED).into()),
            };
            let burst_count = count(&limit.get_item(1)?, "burst_count")?;
            read.push((
                scope,
                Limit::new(
                    number(&limit.get_item(0)?, "per_second")?,
                    u32::try_from(burst_count).unwrap_or(u32::MAX),
                )?,
            ));
        }
        Ok(Self(Limiter::new(read, count(capacity, "capacity")?)))
    }

    fn admit_transaction(
        &mut self,
        origin: &Any<'_>,
        pdus: &Any<'_>,
        now_ms: &Any<'_>,
    ) -> PyResult<Option<RefusalTuple>> {
        let origin = text(origin, "origin")?;
        let now_ms = integer(now_ms, "now_ms")?;
        let claims: Vec<Claim> = pdus
            .try_iter()
            .map_err(|_| wrong_type("pdus", "a list of tuples"))?
            .enumerate()
            .map(|(at, pdu)| Claim::read(&pdu?, at))
            .collect::<PyResult<_>>()?;
        let mut charges = Vec::with_capacity(claims.len() * 3);
        for claim in &claims {
            charges.push((Key::Server(&origin), 1));
            if let Some(room_id) = &claim.room_id {
                charges.push((Key::ServerInRoom(&origin, room_id), 1));
                if let Some(sender) = &claim.sender {
                    charges.push((Key::Sender(sender, room_id), 1));
                }
            }
        }
        Ok(refused(self.0.admit(&charges, now_ms)))
    }

    fn admit_user(
        &mut self,
        user_id: &Any<'_>,
        now_ms: &Any<'_>,
    ) -> PyResult<Option<RefusalTuple>> {
        let user_id = text(user_id, "user_id")?;
        let charges = [(Key::User(&user_id), 1)];
        Ok(refused(self.0.admit(&charges, integer(now_ms, "now_ms")?)))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }
}

/// What a PDU says of itself, as far as it may be believed.
struct Claim {
    room_id: Option<PyBackedStr>,
    sender: Option<PyBackedStr>,
}

impl Claim {
    fn read(pdu: &Any<'_>, at: usize) -> PyResult<Self> {
        const FIELDS: &str = "a tuple (room_id, sender) of str or None";
        let pdu = match pdu.cast::<PyTuple>() {
            Ok(pdu) if pdu.len() == 2 => pdu,
            _ => return Err(wrong_type((at, ""), FIELDS).into()),
        };
        let read = |field: usize, name: &'static str| -> PyResult<Option<PyBackedStr>> {
            let value = pdu.get_item(field)?;
            Ok((!value.is_none())
                .then(|| text(&value, (at, name)))
                .transpose()?)
        };
        Ok(Self {
            room_id: read(0, ".room_id")?,
            sender: read(1, ".sender")?,
        })
    }
}

#[pyclass(name = "ReleaseQueue", module = "synapse_sticky._core")]
pub(super) struct PyReleaseQueue(ReleaseQueue);

#[pymethods]
impl PyReleaseQueue {
    #[new]
    fn new() -> Self {
        Self(ReleaseQueue::new())
    }

    fn admit(
        &self,
        limiter: &mut PyLimiter,
        room_id: &Any<'_>,
        server: &Any<'_>,
        sender: &Any<'_>,
        now_ms: &Any<'_>,
    ) -> PyResult<Option<&'static str>> {
        let room_id = text(room_id, "room_id")?;
        let server = text(server, "server")?;
        let sender = text(sender, "sender")?;
        let now_ms = integer(now_ms, "now_ms")?;
        let decision = self
            .0
            .admit(&mut limiter.0, &room_id, &server, &sender, now_ms);
        Ok(decision.err().map(Scope::name))
    }

    fn add(
        &mut self,
        event_id: &Any<'_>,
        room_id: &Any<'_>,
        server: &Any<'_>,
        sender: &Any<'_>,
        expires_at_ms: &Any<'_>,
    ) -> PyResult<bool> {
        Ok(self.0.add(Deferred {
            event_id: &text(event_id, "event_id")?,
            room_id: &text(room_id, "room_id")?,
            server: &text(server, "server")?,
            sender: &text(sender, "sender")?,
            expires_at_ms: integer(expires_at_ms, "expires_at_ms")?,
        }))
    }

    fn remove(&mut self, event_id: &Any<'_>) -> PyResult<bool> {
        Ok(self.0.remove(&text(event_id, "event_id")?))
    }

    fn take(
        &mut self,
        limiter: &mut PyLimiter,
        now_ms: &Any<'_>,
        max_events: &Any<'_>,
    ) -> PyResult<Vec<String>> {
        let now_ms = integer(now_ms, "now_ms")?;
        let max_events = count(max_events, "max_events")?;
        Ok(self.0.take(&mut limiter.0, now_ms, max_events))
    }

    fn expire(&mut self, now_ms: &Any<'_>, max_events: &Any<'_>) -> PyResult<Vec<String>> {
        let now_ms = integer(now_ms, "now_ms")?;
        Ok(self.0.expire(now_ms, count(max_events, "max_events")?))
    }

    fn next_due_ms(&self, now_ms: &Any<'_>) -> PyResult<Option<i64>> {
        Ok(self.0.next_due_ms(integer(now_ms, "now_ms")?))
    }

    fn waiting(&self, server: &Any<'_>) -> PyResult<usize> {
        Ok(self.0.waiting(&text(server, "server")?))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __contains__(&self, event_id: &Any<'_>) -> PyResult<bool> {
        Ok(self.0.contains(&text(event_id, "event_id")?))
    }
}
