//! Long work: away from the interpreter, but never deaf to it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use futurefill::Error;
use futurefill::watch::{self, Interrupted, Watch};
use pyo3::prelude::*;

use crate::errors;

/// From one look for signals to the next.
pub const PAUSE: Duration = Duration::from_millis(50);

/// Looks for signals now and then, and tells a callable how far the work is.
struct Signals {
    progress: Option<Py<PyAny>>,
    total: usize,
    /// What was told last: it never goes back.
    told: Cell<usize>,
    looked: Cell<Instant>,
    raised: RefCell<Option<PyErr>>,
}

impl Watch for Signals {
    fn poll(&self, done: f64) -> bool {
        if self.looked.get().elapsed() < PAUSE {
            return true;
        }
        let look = |py: Python<'_>| {
            py.check_signals()?;
            self.told.set(self.told.get().max((done * self.total as f64) as usize).min(self.total));
            tell(py, self.progress.as_ref(), self.told.get(), self.total)
        };
        // Without an interpreter, at its end, nobody waits for signals.
        let outcome = Python::try_attach(look).unwrap_or(Ok(()));
        self.looked.set(Instant::now());
        match outcome {
            Ok(()) => true,
            Err(error) => {
                self.raised.replace(Some(error));
                false
            }
        }
    }
}

fn tell(py: Python<'_>, progress: Option<&Py<PyAny>>, done: usize, total: usize) -> PyResult<()> {
    match progress {
        Some(progress) => progress.call1(py, (done, total)).map(drop),
        None => Ok(()),
    }
}

/// Runs `work` without the interpreter lock. A signal whose handler raises, or `progress` if it raises, ends it early.
///
/// `progress` is called as `progress(done, total)` a few times a second, and at the end with `total` twice.
pub fn watched<R: Send>(
    py: Python<'_>,
    total: usize,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce() -> Result<R, Error> + Send,
) -> PyResult<R> {
    let listener = progress.map(|progress| progress.clone().unbind());
    let result = py.detach(move || {
        let signals = Rc::new(Signals {
            progress: listener,
            total,
            told: Cell::new(0),
            looked: Cell::new(Instant::now()),
            raised: RefCell::new(None),
        });
        watch::scope(signals.clone(), work).map_err(|Interrupted| signals.raised.take())
    });
    match result {
        Ok(result) => {
            let result = result.map_err(errors::engine)?;
            py.check_signals()?;
            tell(py, progress.map(|progress| progress.clone().unbind()).as_ref(), total, total)?;
            Ok(result)
        }
        Err(raised) => Err(raised.expect("work is ended early by an exception alone")),
    }
}

/// Whether signals can reach this thread.
pub fn on_main_thread(py: Python<'_>) -> PyResult<bool> {
    let threading = py.import("threading")?;
    threading.call_method0("get_ident")?.eq(threading.call_method0("main_thread")?.getattr("ident")?)
}
