//! From the engine's errors, and its panics, to Python exceptions.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::reserve;
use futurefill::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    futurefill_rs,
    CapacityError,
    PyValueError,
    "More positions were asked for than the cache or the plan's horizon has left."
);

/// The exception for an error of the engine; the text is the engine's own.
pub fn engine(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Capacity { .. } => CapacityError::new_err(text),
        Error::Memory { .. } => PyMemoryError::new_err(text),
        Error::Shape { .. } | Error::Value { .. } | Error::State(_) => PyValueError::new_err(text),
    }
}

/// `ValueError: arg: expected .., got ..`
#[cold]
pub fn value(arg: &str, expected: &str, got: &str) -> PyErr {
    PyValueError::new_err(format!("{arg}: expected {expected}, got {got}"))
}

/// `TypeError: arg: expected .., got ..`
#[cold]
pub fn type_error(arg: &str, expected: &str, got: &str) -> PyErr {
    PyTypeError::new_err(format!("{arg}: expected {expected}, got {got}"))
}

#[cold]
pub fn out_of_memory(bytes: usize) -> PyErr {
    engine(Error::Memory { bytes })
}

/// Runs `work` so that no panic reaches Python: a defect is a RuntimeError with the panic's message.
pub fn shielded<R>(work: impl FnOnce() -> PyResult<R>) -> PyResult<R> {
    reserve::restore()?;
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(defect(&*panic)))
}

/// The exception for a panic.
#[cold]
pub fn defect(panic: &(dyn Any + Send)) -> PyErr {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    PyRuntimeError::new_err(format!("internal error of the engine: {}", text.unwrap_or("unknown")))
}
