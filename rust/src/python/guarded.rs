//! A panic is an error like any other for Python.
//!
//! PyO3 turns a panic into a `BaseException`, which no `except Exception` sees. So no panic gets there: `caught` makes
//! it an `Error`. An object that was in the middle of something is of no use then, and says so from there on.

use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::prelude::*;

use crate::error::Error;

/// What Python is to be called with, once, if the object panics.
pub(super) type OnPanic = Option<Py<PyAny>>;

const LONGEST_MESSAGE: usize = 300;

/// Runs the function; its panic is an error, which names what it was about.
pub(super) fn caught<R>(what: &str, function: impl FnOnce() -> R) -> Result<R, Error> {
    let function = || {
        let result = function();
        #[cfg(feature = "panics")]
        super::panics::strike(what);
        result
    };
    // Whatever is broken by a panic is not used again: `Guarded` sees to that, and all else is new in each call.
    catch_unwind(AssertUnwindSafe(function)).map_err(|panic| Error::Panicked {
        what: what.to_owned(),
        message: message(&*panic),
    })
}

fn message(panic: &(dyn Any + Send)) -> String {
    let whole = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text.as_str(),
        (None, None) => "no message",
    };
    whole.chars().take(LONGEST_MESSAGE).collect()
}

/// An object that Python holds. After a panic every call is an error.
pub(super) struct Guarded<T> {
    name: &'static str,
    object: T,
    is_broken: AtomicBool,
    on_panic: OnPanic,
}

impl<T> Guarded<T> {
    /// Guards what `make` makes.
    pub(super) fn new(
        name: &'static str,
        on_panic: OnPanic,
        make: impl FnOnce() -> T,
    ) -> Result<Self, Error> {
        Ok(Self {
            name,
            object: caught("a constructor", make)?,
            is_broken: AtomicBool::new(false),
            on_panic,
        })
    }

    /// What the function reads of the object.
    pub(super) fn read<'a, R>(&'a self, function: impl FnOnce(&'a T) -> R) -> Result<R, Error> {
        self.check()?;
        let result = caught(self.name, || function(&self.object));
        self.note(&result);
        result
    }

    /// What the function gives, which may change the object.
    pub(super) fn write<'a, R>(
        &'a mut self,
        function: impl FnOnce(&'a mut T) -> R,
    ) -> Result<R, Error> {
        self.check()?;
        let result = caught(self.name, || function(&mut self.object));
        note(&self.is_broken, self.on_panic.as_ref(), &result);
        result
    }

    /// The object, for a call of another one. `spoil` has to be called if that panics.
    pub(super) fn lent(&mut self) -> Result<&mut T, Error> {
        self.check()?;
        Ok(&mut self.object)
    }

    /// Another object's call has panicked while this one was lent to it.
    pub(super) fn spoil<R>(&self, result: &Result<R, Error>) {
        self.note(result);
    }

    fn check(&self) -> Result<(), Error> {
        if self.is_broken.load(Ordering::Acquire) {
            return Err(Error::Panicked {
                what: self.name.to_owned(),
                message: "it has panicked before".to_owned(),
            });
        }
        Ok(())
    }

    fn note<R>(&self, result: &Result<R, Error>) {
        note(&self.is_broken, self.on_panic.as_ref(), result);
    }
}

fn note<R>(is_broken: &AtomicBool, on_panic: Option<&Py<PyAny>>, result: &Result<R, Error>) {
    let Err(error) = result else { return };
    let was_broken = is_broken.swap(true, Ordering::AcqRel);
    let Some(on_panic) = on_panic.filter(|_| !was_broken) else {
        return;
    };
    Python::attach(|py| {
        if let Err(raised) = on_panic.call1(py, (error.to_string(),)) {
            // The panic is what whoever called has to hear of.
            raised.write_unraisable(py, Some(on_panic.bind(py)));
        }
    });
}
