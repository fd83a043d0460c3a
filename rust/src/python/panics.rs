//! Panics that tests ask for: the feature `panics`, which no wheel has.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;

static IS_ARMED: AtomicBool = AtomicBool::new(false);
static LEFT: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());

/// Adds what tests call; the module does not say that it exports it.
pub(super) fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.setattr("_panic_in", wrap_pyfunction!(_panic_in, module)?)
}

/// Has the next calls panic, at their end, with all changes made: those of the objects of this class, of the function
/// of this name, or those that convert the argument of this name.
#[pyfunction]
fn _panic_in(name: String, calls: u32) {
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    left.insert(name, calls);
    IS_ARMED.store(true, Ordering::Release);
}

pub(super) fn strike(name: &str) {
    if IS_ARMED.load(Ordering::Acquire) && is_due(name) {
        #[allow(clippy::panic)] // That is what this is for.
        {
            panic!("a test asked for it");
        }
    }
}

fn is_due(name: &str) -> bool {
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    match left.get_mut(name) {
        Some(calls) if *calls > 0 => {
            *calls -= 1;
            true
        }
        _ => false,
    }
}
